"""How a step is computed, as words and numbers of params.yaml. Without torch, so that the file is read and checked at
once; model/compute/execution.py acts on it.
"""

from __future__ import annotations

from dataclasses import dataclass

WORDS = {
    "device": ("auto", "cpu", "cuda"),
    "precision": ("fp32", "bf16"),
    "compile": ("none", "rollout", "blocks"),
    "attention": ("auto", "math", "efficient", "flash", "cudnn"),
    "checkpointing": ("auto", "always", "never"),
    "merge_rollout": ("auto", "always", "never"),
}


@dataclass(frozen=True)
class ExecutionParams:
    """Section `execution`.

    `micro_batch`: rows of one forward with gradient, `rollout_batch`: rows of one without; 0 takes what fits into the
    free memory. `precision`: "fp32", or "bf16" for the networks' arithmetic (weights that train, latents and Euler
    steps stay fp32). `compile`: torch.compile for one block of each kind, "rollout" only where the student is rolled
    out, "blocks" everywhere (a teacher that equals the student then answers the same up to rounding). `attention`: a
    kernel of torch's scaled_dot_product_attention. `checkpointing`: recompute activations in the backward; "auto" only
    where one row does not fit otherwise.
    `merge_rollout`: add the student's adapter into its weights while it is rolled out; "auto" in fp32 alone, because in
    bf16 it moves the states. `processes`: data-parallel processes on this machine. `shard_base`: spread the frozen
    base's weights over them (FSDP2).
    """

    device: str
    processes: int
    micro_batch: int
    rollout_batch: int
    precision: str
    compile: str
    attention: str
    checkpointing: str
    merge_rollout: str
    shard_base: bool

    def faults(self) -> list[str]:
        found = [
            f"{name} = {getattr(self, name)!r}: choose one of {list(words)}"
            for name, words in WORDS.items()
            if getattr(self, name) not in words
        ]
        found += [
            f"{name} = {getattr(self, name)}: expected 0 (what fits) or more"
            for name in ("micro_batch", "rollout_batch")
            if getattr(self, name) < 0
        ]
        if self.processes < 1:
            found.append(f"processes = {self.processes}: expected 1 or more")
        if self.shard_base and self.processes < 2:
            found.append(f"shard_base = true: needs processes of 2 or more, have {self.processes}")
        return found
