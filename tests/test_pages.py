"""The pages hold together: links lead somewhere, files that a page shows are those that it names, and quoted error
messages are the program's own."""

from __future__ import annotations

import ast
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

from blendserve.cli.words import OPTION_BY_SETTING

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")])
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors_of(page: Path) -> set[str]:
    """Anchors of headings as GitHub makes them."""
    headings = HEADING.findall(FENCE.sub("", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in LINK.findall(FENCE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}, which does not exist"
        assert not anchor or anchor in anchors_of(file), f"{page.name} links to {target}, which has no such heading"


def test_links_from_the_readme_reach_every_page() -> None:
    reached, found = set[Path](), [ROOT / "README.md"]
    while found:
        page = found.pop()
        reached.add(page)
        targets = [(page.parent / link.partition("#")[0]).resolve() for link in LINK.findall(page.read_text())]
        found += [target for target in targets if target.suffix == ".md" and target.is_file() and target not in reached]
    assert set((ROOT / "docs").glob("*.md")) <= reached


PAPER_MAP = (ROOT / "docs" / "paper-map.md").read_text()


def test_the_paper_map_names_files_that_exist() -> None:
    paths = set(re.findall(r"`((?:[\w-]+/)*[\w*-]+(?:\.py|\.cpp|\.h|/))`", PAPER_MAP))
    roots = (ROOT, ROOT / "src" / "blendserve", ROOT / "tests")
    assert len(paths) > 50
    assert not {path for path in paths if not any(list(root.glob(path)) for root in roots)}


def test_the_paper_map_names_tests_that_exist() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    names = set(re.findall(r"`(test_\w+)\*?`", PAPER_MAP))
    assert len(names) > 30
    assert not {name for name in names if f"def {name}" not in sources}


@pytest.mark.parametrize("file", ["slurm.sbatch", "kuberay.yaml"])
def test_the_cluster_page_shows_the_files_of_the_examples(file: str) -> None:
    shown = re.findall(
        r"^```(?:shell|yaml)\n(.*?)^```$", (ROOT / "docs/quickstart-cluster.md").read_text(), re.M | re.S
    )
    assert (ROOT / "examples" / file).read_text() in shown


def test_the_slurm_script_is_valid_bash() -> None:
    subprocess.run(["bash", "-n", ROOT / "examples/slurm.sbatch"], check=True)


def test_the_kuberay_file_asks_for_what_its_command_needs() -> None:
    yaml = pytest.importorskip("yaml")
    claim, job = yaml.safe_load_all((ROOT / "examples/kuberay.yaml").read_text())
    command = job["spec"]["entrypoint"].split()
    cluster = job["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    (worker,) = workers["template"]["spec"]["containers"]
    assert command[command.index("--replicas") + 1] == str(workers["replicas"])
    assert command[command.index("--replica-cpus") + 1] == worker["resources"]["limits"]["cpu"]
    (volume,) = cluster["headGroupSpec"]["template"]["spec"]["volumes"]
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


@cache
def messages_of_the_sources() -> tuple[re.Pattern[str], ...]:
    """Every text of the sources that may be a message, with anything where a value is filled in."""
    patterns = []
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            parts: list[str | None] = []
            if isinstance(node, ast.JoinedStr):
                parts = [str(part.value) if isinstance(part, ast.Constant) else None for part in node.values]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                parts = [node.value]
            if sum(len(part or "") for part in parts) >= 12:
                patterns.append(re.compile("".join(".*" if part is None else re.escape(part) for part in parts)))
    return tuple(patterns)


def is_printed(message: str) -> bool:
    in_settings = message
    for setting, option in OPTION_BY_SETTING.items():
        in_settings = in_settings.replace(f"{option} is", f"{setting} is")
    return any(pattern.fullmatch(text) for pattern in messages_of_the_sources() for text in {message, in_settings})


QUOTED = re.findall(r"^    blendserve: (.+)$", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("message", QUOTED, ids=lambda message: message[:50])
def test_quoted_messages_are_those_of_the_program(message: str) -> None:
    """A message stands in the sources as one text with values in it. If its words change, the page must change too."""
    assert is_printed(message), "change docs/troubleshooting.md too"


def test_a_message_with_other_words_is_noticed() -> None:
    (message,) = (text for text in QUOTED if text.startswith("no model"))
    assert is_printed(message)
    assert not is_printed(message.replace("hub id", "hub name"))
