"""Every published format in a small sample written as its source writes it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from blendserve.errors import ConfigError
from blendserve.simulator.workloads.loaders import load_chats, load_lengths, load_mmlu, load_openvid, load_sharegpt
from blendserve.simulator.workloads.source import prefix_tree, workload_from_prompts

BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,230,1317,Conversation log
118,GPT-4,417,0,417,API log
"""
AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319600,3180,8
"""
OPENVID = """video,caption,aesthetic score,camera motion,frame,fps,seconds
a.mp4,"A man, walking",5.1,static,30,30.0,1.0
b.mp4,"A ""dog""\nrunning",5.0,pan_left,90,30.0,3.0
"""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (BURSTGPT, [(472, 18), (1087, 230)]),
        (AZURE, [(4808, 10), (3180, 8)]),
        ("input_tokens,output_tokens\n42,285\n", [(42, 285)]),
        ("\ufeffprompt_len,output_len\r\n42,285\r\n7,9\r\n", [(42, 285), (7, 9)]),
    ],
)
def test_length_tables(tmp_path: Path, text: str, expected: list[tuple[int, int]]) -> None:
    trace = load_lengths(write(tmp_path / "trace.csv", text))
    assert trace.name == "trace"
    assert list(zip(trace.num_prompt_tokens.tolist(), trace.num_output_tokens.tolist(), strict=True)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "has columns a, b; it needs one of"),
        ("", "has columns none"),
        ("input_tokens,output_tokens\n1,2\nx,3\n", "line 3: input_tokens is 'x', not a number"),
        ("input_tokens,output_tokens\n1\n", "line 2: output_tokens is None"),
        ("input_tokens,output_tokens\n", "holds no request"),
    ],
)
def test_bad_length_tables_say_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_lengths(write(tmp_path / "trace.csv", text))


def test_a_missing_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_lengths(tmp_path / "nowhere.csv")


def test_openvid_scales_frames_to_the_mean(tmp_path: Path) -> None:
    trace = load_openvid(write(tmp_path / "openvid.csv", OPENVID), lambda text: len(text.split()), mean_tokens=1000)
    assert trace.num_prompt_tokens.tolist() == [3, 3]
    assert trace.num_output_tokens.tolist() == [500, 1500]
    assert trace.has_known_outputs
    with pytest.raises(ConfigError, match="lacks the columns caption"):
        load_openvid(write(tmp_path / "bad.csv", "frame\n3\n"), len)


def test_sharegpt_takes_first_turns(tmp_path: Path) -> None:
    records = [
        {"id": "1", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        {"id": "2", "conversations": [{"from": "gpt", "value": "hello"}, {"from": "human", "value": "hi"}]},
        {"id": "3", "conversations": []},
    ]
    (request,) = load_sharegpt(write(tmp_path / "sharegpt.json", json.dumps(records)))
    assert (request.prompt, request.answer) == ("hi", "hello")


@pytest.mark.parametrize("is_lines", [True, False])
def test_wildchat_and_lmsys_take_first_turns(tmp_path: Path, is_lines: bool) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    records = [{"model": "m", "conversation": turns}, {"conversation": turns[:1]}]
    text = "\n".join(json.dumps(record) for record in records) if is_lines else json.dumps(records)
    (request,) = load_chats(write(tmp_path / "chats.json", text))
    assert (request.prompt, request.answer) == ("hi", "hello")


def test_a_broken_json_line_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="line 2 is not json"):
        list(load_chats(write(tmp_path / "chats.jsonl", '{"conversation": []}\n{"conv\n')))


def test_mmlu_prompts_share_their_subjects_examples(tmp_path: Path) -> None:
    write(tmp_path / "dev" / "world_religions_dev.csv", 'Q1,a,b,c,d,A\n"Q2, quoted",a,b,c,d,B\n')
    write(tmp_path / "test" / "world_religions_test.csv", "T1,w,x,y,z,C\nT2,w,x,y,z,D\n")
    first, second = load_mmlu(tmp_path)
    prefix = "The following are multiple choice questions (with answers) about world religions.\n\nQ1\nA. a\n"
    assert first.prompt.startswith(prefix)
    assert first.prompt.endswith("Answer: B\n\nT1\nA. w\nB. x\nC. y\nD. z\nAnswer:")
    assert first.answer == " C"
    assert second.prompt.split("T2")[0] == first.prompt.split("T1")[0]


def test_mmlu_without_its_files_says_where_they_belong(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unpack the MMLU archive"):
        list(load_mmlu(tmp_path))
    write(tmp_path / "test" / "a_test.csv", "Q,a,b\n")
    write(tmp_path / "dev" / "a_dev.csv", "Q,a,b,c,d,A\n")
    with pytest.raises(ConfigError, match="row 1 has 3 fields"):
        list(load_mmlu(tmp_path))


def test_real_prompts_become_a_workload() -> None:
    prompts = [np.array(tokens, dtype=np.int32) for tokens in ([1] * 40, [1] * 33 + [2] * 9, [7, 8])]
    workload = workload_from_prompts("job", prompts, np.array([5, 6, 7]))
    assert workload.num_prompt_tokens.tolist() == [40, 42, 2]
    assert workload.sharing == 32 / 84
    assert (workload.known_output_tokens == -1).all()
    assert prefix_tree(workload).num_unique_tokens == 84 - 33
