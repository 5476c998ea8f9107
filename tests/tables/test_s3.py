"""Tables behind URLs, on a server that speaks S3, with processes that die while they upload."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from batch_fakes import mixed_lines, write_lines
from table_fakes import PROMPT, TableEngine, run_map, table_of, write_parquet

from blendserve.errors import ConfigError
from blendserve.tables.layout import Layout
from blendserve.tables.mapping import TableJob, open_table, run_table

s3fs = pytest.importorskip("s3fs")
moto_server = pytest.importorskip("moto.server")

TESTS = Path(__file__).parent.parent
NUM_ROWS = 40


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = moto_server.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A bucket of its own, as `s3://NAME`, and its file system; the environment leads there."""
    for name, value in (
        ("AWS_ENDPOINT_URL", endpoint),
        ("AWS_ACCESS_KEY_ID", "testing"),
        ("AWS_SECRET_ACCESS_KEY", "testing"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    fs = s3fs.S3FileSystem()
    name = f"bucket-{tmp_path.name.replace('_', '-').lower()[:40]}".rstrip("-")
    fs.mkdir(name)
    yield fs, f"s3://{name}"
    s3fs.S3FileSystem.clear_instance_cache()


def child(
    source: str, output: str, journal: Path, rows_per_file: int = 0, *death: object
) -> subprocess.CompletedProcess[str]:
    arguments = [source, output, str(journal), str(rows_per_file), *map(str, death)]
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent / 'src'}"}
    return subprocess.run(
        [sys.executable, str(TESTS / "s3_child.py"), *arguments], capture_output=True, text=True, env=environment
    )


def put(bucket: Any, name: str, table: Any, tmp_path: Path) -> str:
    fs, url = bucket
    fs.put_file(str(write_parquet(tmp_path / "local.parquet", table)), f"{url}/{name}")
    return f"{url}/{name}"


def get(bucket: Any, url: str, tmp_path: Path) -> Any:
    fs, _ = bucket
    fs.invalidate_cache()
    names = sorted(fs.find(url))
    tables = []
    for at, name in enumerate(names):
        fs.get_file(name, str(tmp_path / f"got-{at}"))
        tables.append(pq.read_table(tmp_path / f"got-{at}"))
    return pa.concat_tables(tables)


@pytest.fixture
def whole(tmp_path: Path) -> Any:
    """What the job makes of the same table on this machine."""
    local = tmp_path / "whole"
    local.mkdir()
    run_map(write_parquet(local / "in.parquet", table_of(NUM_ROWS)), local / "out.parquet")
    return pq.read_table(local / "out.parquet")


@pytest.mark.parametrize("death", [("put_object", 1), pytest.param(("get_object", 2), marks=pytest.mark.thorough)])
def test_a_job_that_dies_on_the_way_to_one_object_goes_on(
    tmp_path: Path, bucket: Any, whole: Any, death: tuple[str, int]
) -> None:
    source, output, journal = (
        put(bucket, "in.parquet", table_of(NUM_ROWS), tmp_path),
        f"{bucket[1]}/out.parquet",
        tmp_path / "kept",
    )
    assert child(source, output, journal, 0, *death).returncode == -signal.SIGKILL
    assert not bucket[0].exists(output), "an object appears as a whole"
    done = child(source, output, journal)
    assert done.returncode == 0, done.stderr
    assert get(bucket, output, tmp_path).equals(whole)
    if death[0] == "put_object":
        assert done.stdout.startswith("0 "), "all answers were in the journal"
    assert child(source, output, journal).stdout.split() == ["0", output, "True"]


def test_a_job_that_dies_between_parts_goes_on_and_leaves_no_old_ones(tmp_path: Path, bucket: Any, whole: Any) -> None:
    source, output, journal = (
        put(bucket, "in.parquet", table_of(NUM_ROWS), tmp_path),
        f"{bucket[1]}/parts",
        tmp_path / "kept",
    )
    assert child(source, output, journal, 12, "put_object", 3).returncode == -signal.SIGKILL
    done = child(source, output, journal, 12)
    assert done.returncode == 0, done.stderr
    bucket[0].invalidate_cache()
    assert len(bucket[0].find(output)) == 4
    assert get(bucket, output, tmp_path).equals(whole)
    larger = child(source, output, journal, 30)
    assert larger.stdout.startswith("0 "), larger.stderr
    bucket[0].invalidate_cache()
    assert len(bucket[0].find(output)) == 2
    assert get(bucket, output, tmp_path).equals(whole)


@pytest.mark.thorough
def test_a_large_object_that_is_half_uploaded_is_none(tmp_path: Path, bucket: Any) -> None:
    """Objects beyond 100 MiB go in several requests."""
    noise = pa.table({"text": ["x", "y"], "noise": [os.urandom(60 << 20), os.urandom(60 << 20)]})
    source, output, journal = put(bucket, "in.parquet", noise, tmp_path), f"{bucket[1]}/out.parquet", tmp_path / "kept"
    assert child(source, output, journal, 0, "upload_part", 2).returncode == -signal.SIGKILL
    assert not bucket[0].exists(output)
    assert child(source, output, journal).returncode == 0
    assert get(bucket, output, tmp_path).select(["text", "noise"]).equals(noise)


def job_on(source: str, output: str, journal: Path | None) -> TableJob:
    return TableJob(open_table(source), output, PROMPT, Layout.of(output), journal, inputs=[source])


def test_objects_of_others_are_not_replaced_and_changes_are_noticed(tmp_path: Path, bucket: Any) -> None:
    fs, url = bucket
    source, output = put(bucket, "in.parquet", table_of(10), tmp_path), f"{url}/out.parquet"
    fs.pipe_file(output, b"mine")
    with pytest.raises(ConfigError, match=f"{output} exists .4 bytes. and is not of this job"):
        run_table(job_on(source, output, tmp_path / "kept"), TableEngine(), "blend")
    fs.rm(output)
    run_table(job_on(source, output, tmp_path / "kept"), TableEngine(), "blend")
    fs.pipe_file(output, b"other")
    with pytest.raises(ConfigError, match=f"{output} was changed since"):
        run_table(job_on(source, output, tmp_path / "kept"), TableEngine(), "blend")
    fs.rm(output)
    put(bucket, "in.parquet", table_of(12), tmp_path)
    engine = TableEngine()
    report = run_table(job_on(source, output, tmp_path / "kept"), engine, "blend")
    assert (engine.fake.num_answers, report.num_reused) == (2, 9)


def test_globs_and_directories_of_objects_are_tables(tmp_path: Path, bucket: Any) -> None:
    _, url = bucket
    for at in range(3):
        put(bucket, f"day/part-{at}.parquet", table_of(30).slice(at * 10, 10), tmp_path)
    for source in (f"{url}/day", f"{url}/day/part-*.parquet"):
        output = tmp_path / f"out-{len(source)}.parquet"
        report = run_table(job_on(source, str(output), None), TableEngine(), "blend")
        assert report.num_lines == 30
        assert pq.read_table(output).select(table_of(30).column_names).equals(table_of(30))


def test_mistakes_with_urls_are_told(tmp_path: Path, bucket: Any) -> None:
    _, url = bucket
    source = put(bucket, "in.parquet", table_of(10), tmp_path)
    with pytest.raises(ConfigError, match="name a directory for it with --journal DIR"):
        run_table(job_on(source, f"{url}/out.parquet", None), TableEngine(), "blend")
    with pytest.raises(ConfigError, match="is the input; a job never writes over what it reads"):
        run_table(job_on(source, source, tmp_path / "kept"), TableEngine(), "blend")
    with pytest.raises(ConfigError, match=r"cannot read s3://.*no.parquet: there is no such file"):
        open_table(f"{url}/no.parquet")
    with pytest.raises(ConfigError, match=r"cannot use nowhere://x\.parquet"):
        open_table("nowhere://x.parquet")
    with pytest.raises(ConfigError, match=r"cannot write s3://no-such-bucket-anywhere/out.parquet"):
        run_table(job_on(source, "s3://no-such-bucket-anywhere/out.parquet", tmp_path / "kept"), TableEngine(), "blend")


@pytest.mark.parametrize(
    "death",
    [
        ("put_object", 2),
        pytest.param(("put_object", 1), marks=pytest.mark.thorough),
        pytest.param(("get_object", 1), marks=pytest.mark.thorough),
    ],
)
def test_a_batch_file_goes_on_too(tmp_path: Path, bucket: Any, death: tuple[str, int]) -> None:
    fs, url = bucket
    write_lines(tmp_path / "in.jsonl", mixed_lines(30))
    fs.put_file(str(tmp_path / "in.jsonl"), f"{url}/in.jsonl")
    output, errors, journal = f"{url}/out.jsonl", f"{url}/out.errors.jsonl", tmp_path / "kept"
    assert child(f"{url}/in.jsonl", output, journal, 0, *death).returncode == -signal.SIGKILL
    assert not fs.exists(output)
    done = child(f"{url}/in.jsonl", output, journal)
    assert done.returncode == 0, done.stderr
    fs.invalidate_cache()
    assert len(fs.cat_file(output).splitlines()) == 27
    assert len(fs.cat_file(errors).splitlines()) == 3
    assert child(f"{url}/in.jsonl", output, journal).stdout.split() == ["0", output, "True"]
