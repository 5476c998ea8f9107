"""The commands, what each is for, and their exit codes; `blendserve --help` needs no more of them."""

from __future__ import annotations

HELP_BY_COMMAND = {
    "run": "answer every line of a batch file",
    "map": "answer every row of a table",
    "export": "write the answers that a job has so far",
    "check": "validate a batch file without running it",
    "plan": "say what a batch file holds and how long it would take",
    "simulate": "simulate how long a job would take on given hardware",
    "calibrate": "measure this machine, so that plans fit it",
    "models": "list cached models, or fetch one",
    "serve": "serve OpenAI's Batch API",
    "keys": "make, list and revoke API keys of a service",
    "submit": "send a batch file to a Batch API, and fetch the answers",
    "batches": "show batches of a Batch API, and fetch their files",
    "cancel": "cancel a batch of a Batch API",
}

EXIT_CODES = {
    0: "done; of `run` and `map`: everything was answered",
    1: "it could not be done; the message is on standard error; of `check`: a line has an error",
    2: "the command line is not understood",
    3: "of `run` and `map`: the job is finished; some lines or rows, or all of them, have errors and no answers",
    129: "stopped by SIGHUP, as when a terminal closes; the same command goes on",
    130: "stopped by Ctrl-C; the same command goes on",
    138: "stopped by SIGUSR1, which Slurm sends before the time is up if asked to; the same command goes on",
    143: "stopped by SIGTERM; the same command goes on",
}
