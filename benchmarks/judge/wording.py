"""The texts of the questions: ours, or others that the user has, such as the upstream's.

Grades are asked for by two kinds of question, SEMANTIC and QUALITY; which of two results is better, by PREFERRED_EDIT
and, for images drawn from a text alone, PREFERRED_IMAGE."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

from data.errors import UserError, UserErrors
from data.files import explain, sha256_bytes

SEMANTIC, QUALITY = "semantic", "quality"
KINDS = (SEMANTIC, QUALITY)
PREFERRED_EDIT, PREFERRED_IMAGE = "preferred_edit", "preferred_image"
PREFERENCES = (PREFERRED_EDIT, PREFERRED_IMAGE)
PLACEHOLDER = "<instruction>"
GRADES_REPLY = """Answer with one JSON object and nothing else, in this form:
{"score": [a, b], "reasoning": "one or two short sentences"}
where a and b are numbers from 0 to 10."""
OWN_SEMANTIC = f"""You grade the work of an image editing program. Every picture was made by a computer, \
also where it shows people.

You see two pictures: first the source, then the result. The program was told to apply this instruction to the source:

{PLACEHOLDER}

Give two grades.
a: how well the instruction was carried out. 0 means that nothing of what was asked for is there, \
or that source and result look the same; 10 means that
all of it is there.
b: how well everything else was kept. 0 means that the result shows a different scene; \
10 means that nothing changed beyond what the instruction needs.

{GRADES_REPLY}"""
OWN_QUALITY = f"""You grade the technical quality of a picture. It was made by a computer, also where it shows people.

Give two grades.
a: how natural it looks. 0 means that the scene cannot be believed at all: \
light, shadows, distances or proportions are wrong; 10 means that it looks natural
throughout.
b: how free of defects it is. 0 means that distortions, blurred faces, malformed bodies, \
watermarks, scratches or things that do not belong together
dominate; 10 means that there are none.

{GRADES_REPLY}"""
CHOICE_REPLY = """Answer with one JSON object and nothing else, in this form:
{"winner": "A", "reasoning": "one or two short sentences"}
where winner is "A", "B" or "tie"."""
_TIE = (
    """Say tie where you see no difference that matters. Which of the two comes first means nothing.

"""
    + CHOICE_REPLY
)
OWN_PREFERRED_EDIT = f"""You compare two results of image editing programs. Every picture was made by a computer, \
also where it shows people.

You see three pictures: first the source, then result A, then result B. \
Both programs were told to apply this instruction to the source:

{PLACEHOLDER}

Which result is better? Look first at how well the instruction was carried out, then at how well everything else was \
kept, then at how natural and free of defects the result is. {_TIE}"""
OWN_PREFERRED_IMAGE = f"""You compare two pictures that programs have drawn. Every picture was made by a computer, \
also where it shows people.

You see picture A, then picture B. Both programs were told to draw this:

{PLACEHOLDER}

Which picture is better? Look first at how much of what was asked for is there, and whether it is right; \
then at how natural and free of defects the picture is. {_TIE}"""
# sha256 of the upstream texts before the instruction is put in: Step1X-Edit at 570eba6, read with `load_wording`
OFFICIAL = {
    SEMANTIC: "8f529562c2f89f8db51a3f7cc4d487686f676909c21010b67b0e65ec78150de5",
    QUALITY: "2473ff2c7406e06545c5c039ceb039ff2604ebacf150868a48f0bf07c9e733b0",
}
UPSTREAM_FILE = "vie_prompts.py"
UPSTREAM_PARTS = {  # constants of that file, joined by newlines
    SEMANTIC: ("_context_no_delimit", "_prompts_0shot_two_image_edit_rule", "_prompts_0shot_tie_rule_SC"),
    QUALITY: ("_context_no_delimit", "_prompts_0shot_rule_PQ"),
}


@dataclass(frozen=True)
class Wording:
    """The two questions' texts; `name` is "own", "official" or "custom"."""

    semantic: str
    quality: str
    name: str

    def text(self, kind: str, instruction: str) -> str:
        return self.semantic.replace(PLACEHOLDER, instruction) if kind == SEMANTIC else self.quality

    def identity(self) -> dict[str, str]:
        """The name and both texts' SHA-256, which are stored with every result."""
        texts = {SEMANTIC: self.semantic, QUALITY: self.quality}
        return {"name": self.name, **{kind: sha256_bytes(text.encode()) for kind, text in texts.items()}}


@dataclass(frozen=True)
class PairWording:
    """The texts that ask which of two results is better; `name` is "own" or "custom"."""

    edit: str
    image: str
    name: str

    def text(self, kind: str, instruction: str) -> str:
        return (self.edit if kind == PREFERRED_EDIT else self.image).replace(PLACEHOLDER, instruction)

    def identity(self) -> dict[str, str]:
        """The name and both texts' SHA-256, which are stored with every result."""
        texts = {PREFERRED_EDIT: self.edit, PREFERRED_IMAGE: self.image}
        return {"name": self.name, **{kind: sha256_bytes(text.encode()) for kind, text in texts.items()}}


def load_pair_wording(folder: Path | None) -> PairWording:
    """Our texts for None; else those of a folder with `preferred_edit.txt` and `preferred_image.txt`, in which
    `<instruction>` stands for instruction or prompt. Raises UserErrors for missing files or placeholders."""
    if folder is None:
        return PairWording(OWN_PREFERRED_EDIT, OWN_PREFERRED_IMAGE, "own")
    texts, faults = [], []
    for kind in PREFERENCES:
        file = folder / f"{kind}.txt"
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            faults.append(f"{file}: cannot be read ({error})")
            continue
        if PLACEHOLDER not in texts[-1]:
            faults.append(f"{file}: has no {PLACEHOLDER}; the judge would not know what was asked for")
    if faults:
        raise UserErrors(f"{folder}: not a folder of texts that compare two results:", faults)
    edit, image = texts
    return PairWording(edit, image, "custom")


def _constants(path: Path) -> dict[str, str]:
    """Top-level string constants of a Python file, read without running it."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{path}: not a readable Python file ({error})") from error
    return {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def load_wording(path: str | Path | None) -> Wording:
    """Our texts for None; else those of a folder with `semantic.txt` and `quality.txt`, or of the upstream's
    `vie_prompts.py` (or the folder that holds it). `<instruction>` in the semantic text stands for the instruction.
    They count as "official" when their SHA-256 is the upstream's. Raises UserError(s) for missing files, constants or
    placeholder."""
    if path is None:
        return Wording(OWN_SEMANTIC, OWN_QUALITY, "own")
    path = Path(path)
    upstream = path / UPSTREAM_FILE if path.is_dir() else path
    try:
        if upstream.is_file():
            constants = _constants(upstream)
            missing = sorted({name for names in UPSTREAM_PARTS.values() for name in names} - constants.keys())
            if missing:
                raise UserErrors(f"{upstream}: not the upstream's file of prompts; it lacks the texts:", missing)
            texts = {kind: "\n".join(constants[name] for name in names) for kind, names in UPSTREAM_PARTS.items()}
        else:
            texts = {kind: (path / f"{kind}.txt").read_text(encoding="utf-8") for kind in KINDS}
    except FileNotFoundError as error:
        needs = f"give a folder with {SEMANTIC}.txt and {QUALITY}.txt, or the upstream's {UPSTREAM_FILE}"
        raise UserError(f"{error.filename}: no such file; {needs}") from error
    except OSError as error:
        raise explain(error, path) from error
    if PLACEHOLDER not in texts[SEMANTIC]:
        raise UserError(f"{path}: the semantic text has no {PLACEHOLDER}; the judge would not know what was asked for")
    official = all(sha256_bytes(texts[kind].encode()) == known for kind, known in OFFICIAL.items())
    return Wording(texts[SEMANTIC], texts[QUALITY], "official" if official else "custom")
