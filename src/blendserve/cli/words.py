"""Messages in the words of the command line: settings by the names of their options."""

from __future__ import annotations

import re

OPTION_BY_SETTING = {
    "enable_prefix_caching": "--no-prefix-caching",
    "kv_memory_bytes": "--kv-memory",
    "kv_tokens": "--kv-tokens",
    "max_attempts": "--max-attempts",
    "max_inflight": "--max-inflight",
    "max_model_len": "--max-model-len",
    "max_num_batched_tokens": "--max-num-batched-tokens",
    "max_num_seqs": "--max-num-seqs",
    "max_outage_s": "--max-outage",
    "max_restarts": "--max-restarts",
    "num_cpus": "--replica-cpus",
    "num_gpus": "--replica-gpus",
    "num_replicas": "--replicas",
    "num_threads": "--threads",
    "request_timeout_s": "--request-timeout",
}
_SETTING = re.compile(r"(?<![\w.'\"`-])(" + "|".join(OPTION_BY_SETTING) + r")(?![\w='\"`])")


def in_option_words(message: str) -> str:
    """A message about settings for somebody who gave options."""
    told = _SETTING.sub(lambda match: OPTION_BY_SETTING[match[1]], message)
    return told.replace(", or None to leave it open", ", or leave it out")
