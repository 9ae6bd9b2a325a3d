"""Forms in which other tools load a student, one file a form. A further form is a file like merged.py and an entry
here."""

from tasks.student.exports import comfyui, diffusers, merged, peft
from tasks.student.exports.form import Form

FORMS: dict[str, Form] = {
    "merged": merged.FORM,
    "peft": peft.FORM,
    "diffusers": diffusers.FORM,
    "comfyui": comfyui.FORM,
}
