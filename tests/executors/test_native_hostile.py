"""The compiled core called directly with what no engine would send: each call is a ValueError, never a crash.

One child process makes all calls, so that a crash fails a test instead of ending pytest.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

PREAMBLE = """
import numpy as np
from blendserve import _native

def loader():
    zeros = lambda *shape: np.zeros(shape, np.float32)
    weights = _native.WeightLoader("portable", "bf16", 1)
    weights.set_layer(0, qkv=zeros(96, 32), output=zeros(32, 32), gate_up=zeros(128, 32), down=zeros(32, 64),
                      input_norm=zeros(32), post_attention_norm=zeros(32))
    weights.set_ends(embedding=None, lm_head=zeros(260, 32), norm=zeros(32), inverse_frequencies=np.zeros(8))
    return weights

def model(shape={}, limits={}, num_threads=1):
    shape = dict(vocab_size=260, hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2, num_kv_heads=2,
                 head_dim=16, rms_norm_eps=1e-5) | shape
    limits = dict(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=512, num_blocks=64,
                  kv_dtype="bf16") | limits
    return _native.Model(loader(), _native.ModelShape(**shape), _native.ModelLimits(**limits), num_threads=num_threads)

def params(**changes):
    return _native.SamplingParams(**dict(temperature=1.0, top_p=1.0, min_p=0.0, presence_penalty=0.0,
        frequency_penalty=0.0, repetition_penalty=1.0, top_k=0, num_logprobs=-1, min_tokens=0, num_prompt_tokens=0,
        seed=1, logit_bias=[], stop_token_ids=[], allowed_token_ids=[], bad_words=[]) | changes)

def ints(*values):
    return np.array(values, np.int32)

def step(model, slots=(0,), scheduled=(5,), computed=(0,), tokens=0, block=0, sampled=None):
    table = np.full((4, 512), tokens, np.int32)
    is_sampled = np.array([True] * len(slots) if sampled is None else sampled, np.bool_)
    model.forward(ints(*slots), ints(*scheduled), ints(*computed), is_sampled, table,
                  np.full((4, 32), block, np.int32))
    return model.sample()

def masked(rows, shape):
    made = model()
    step(made)
    return made.sample(ints(*rows), np.zeros(shape, np.int32))

def step_with(changes, first_token, scheduled=5, computed=16):
    made = model()
    made.admit(0, params(**changes))
    table = np.zeros((4, 512), np.int32)
    table[0, :16] = first_token
    made.forward(ints(0), ints(scheduled), ints(computed), np.ones(1, np.bool_), table, np.zeros((4, 32), np.int32))
    return made.sample()

nan = float("nan")
"""

HOSTILE_CALLS = [
    ("step_with({'presence_penalty': 1.0}, 10**9)", "token id is 1000000000", "260"),
    ("step_with({'frequency_penalty': 1.0}, 260)", "token id is 260", "260"),
    ("step_with({'repetition_penalty': 1.5}, -1)", "token id is -1", "260"),
    ("step(model(), (), (), ())", "number of sequences is 0", "1 or more"),
    ("step(model(), slots=(-1,))", "slot is -1", "4"),
    ("step(model(), slots=(4,))", "slot is 4", "4"),
    ("step(model(), scheduled=(0,))", "scheduled tokens of an entry is 0", "1 or more"),
    ("step(model(), scheduled=(2**31 - 1,))", "length is 2147483647", "512"),
    ("step(model(), computed=(2**31 - 1,))", "length is 2147483652", "512"),
    ("step(model(), computed=(-3,))", "computed tokens of an entry is -3", "0 or more"),
    ("step(model(), tokens=260)", "token id is 260", "260"),
    ("step(model(), tokens=-1)", "token id is -1", "260"),
    ("step(model(), block=64)", "block number is 64", "64"),
    ("step(model(), block=-1)", "block number is -1", "64"),
    ("step(model(), (0, 1, 2, 3, 0), (1,) * 5, (0,) * 5)", "number of sequences is 5", "4"),
    ("step(model(), sampled=[])", "differ in length", ""),
    ("masked((0, 0), (1, 9))", "masks for 2 rows", "the step has 1"),
    ("masked((1,), (1, 9))", "mask 1 does not exist", "there are 1"),
    ("masked((0,), (1, 8))", "a mask has 8 words", "260"),
    ("model().logits(ints(-1))", "token id is -1", "260"),
    ("model().logits(ints(*[0] * 600))", "sequence length is 576", "512"),
    ("model().admit(2**40, params())", "slot 1099511627776", "4"),
    ("model().admit(0, params(temperature=nan))", "temperature is nan", "from 0"),
    ("model().admit(0, params(top_p=nan))", "top_p is nan", "from 0 to 1"),
    ("model().admit(0, params(min_p=2.0))", "min_p is 2", "from 0 to 1"),
    ("model().admit(0, params(num_prompt_tokens=-5))", "num_prompt_tokens is -5", "0 or more"),
    ("model().admit(0, params(logit_bias=[(260, 1.0)]))", "token 260", "260"),
    ("model().admit(0, params(allowed_token_ids=[260]))", "260", "260"),
    ("model().admit(0, params(bad_words=[[-1]]))", "-1", "260"),
    ("model(num_threads=0)", "num_threads is 0", "from 1"),
    ("model(num_threads=-1)", "num_threads is -1", "from 1"),
    ("model(limits={'max_num_seqs': 0})", "max_num_seqs is 0", "from 1 to 2147483647"),
    ("model(limits={'max_num_batched_tokens': 2**58})", "max_num_batched_tokens is", "2147483647"),
    ("model(limits={'max_model_len': -1})", "max_model_len is -1", "2147483647"),
    ("model(limits={'num_blocks': 2**53})", "num_blocks is", "2147483647"),
    ("model(limits={'kv_dtype': 'fp8'})", "unknown KV dtype 'fp8'", "bf16 or int8"),
    ("model(shape={'num_heads': 0, 'num_kv_heads': 1})", "num_heads is 0", "from 1"),
    ("model(shape={'num_kv_heads': 0})", "num_kv_heads is 0", "from 1"),
    ("model(shape={'head_dim': 2**62})", "head_dim is", "16777216"),
    ("model(shape={'vocab_size': 2**40})", "vocab_size is", "16777216"),
    ("model(shape={'num_layers': 0})", "num_layers is 0", "65536"),
    ("_native.WeightLoader('portable', 'bf16', 0)", "num_layers is 0", "65536"),
    ("_native.WeightLoader('portable', 'bf16', 2**40)", "num_layers is 1099511627776", "65536"),
]


@pytest.fixture(scope="module")
def messages() -> dict[str, str]:
    """What each call raised, by call; calls behind one that crashed the child are missing."""
    calls = [call for call, *_ in HOSTILE_CALLS]
    script = f"""{PREAMBLE}
step(model())
for call in {calls!r}:
    try:
        eval(call)
        print(f"{{call}}\\treturned", flush=True)
    except ValueError as error:
        print(f"{{call}}\\t{{error}}", flush=True)
"""
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    messages = dict(line.split("\t", 1) for line in child.stdout.splitlines())
    return messages | {"": f"exit status {child.returncode}, {child.stderr[-500:]}"}


@pytest.mark.parametrize(("call", "value", "limit"), HOSTILE_CALLS)
def test_a_hostile_call_is_a_value_error(messages: dict[str, str], call: str, value: str, limit: str) -> None:
    assert call in messages, f"the process ended before or in this call: {messages['']}"
    assert value in messages[call]
    assert limit in messages[call]


def test_unknown_tokens_are_refused_only_where_they_are_read() -> None:
    """A sequence without penalties never looks at the tokens of earlier steps."""
    script = f"{PREAMBLE}\nstep_with({{}}, 10**9)\nprint('sampled')"
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert child.stdout == "sampled\n"
