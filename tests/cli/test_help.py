"""`--help` of the commands: short and long, and that every option tells its default."""

from __future__ import annotations

import argparse
import re

import pytest

from blendserve.cli import _parser, main
from blendserve.cli.commands import HELP_BY_COMMAND
from blendserve.cli.run import MOST_USED


def subparser(name: str) -> argparse.ArgumentParser:
    (commands,) = [action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction)]
    found: argparse.ArgumentParser = commands.choices[name]
    return found


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    return capsys.readouterr().out


def options_in(text: str) -> set[str]:
    return set(re.findall(r"^  (?:-\w[ \w.]*, )?(--[\w-]+)", text, re.MULTILINE))


def test_the_short_help_of_run_has_what_most_people_need(capsys: pytest.CaptureFixture[str]) -> None:
    short, long = (shown(capsys, "run", option) for option in ("--help", "--help-all"))
    named = {f"--{name.replace('_', '-')}" for name in MOST_USED}
    assert options_in(short) == {*named, "--help", "--help-all"}
    assert options_in(long) == {
        option for action in subparser("run")._actions for option in action.option_strings if option.startswith("--")
    }
    assert options_in(short) < options_in(long)
    assert "vLLM engine:" in long
    assert "vLLM engine:" not in short


@pytest.mark.parametrize("command", ["run", "map", "check", "plan", "simulate", "calibrate"])
def test_every_option_with_a_value_tells_its_default(command: str) -> None:
    for action in subparser(command)._actions:
        if action.option_strings and action.nargs != 0 and not action.required:
            assert "default" in str(action.help), f"{command} {action.option_strings[-1]}"
            assert action.metavar or action.choices, f"{command} {action.option_strings[-1]}"


def test_one_command_loads_what_it_needs_and_knows_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert _parser("models").parse_args(["models"]).command.__name__ == "run_list"
    text = shown(capsys, "--help")
    assert all(name in text and help_text in " ".join(text.split()) for name, help_text in HELP_BY_COMMAND.items())
