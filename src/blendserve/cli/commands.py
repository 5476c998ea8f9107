"""The commands and what each is for; `blendserve --help` needs no more of them."""

from __future__ import annotations

HELP_BY_COMMAND = {
    "run": "answer every line of a batch file",
    "check": "validate a batch file without running it",
    "plan": "say what a run of a batch file would be like",
    "simulate": "say what a job would take on given hardware",
    "calibrate": "measure this machine for plans of it",
    "models": "list cached models, or fetch one",
}
