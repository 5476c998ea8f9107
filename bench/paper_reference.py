"""The paper's own figures (ASPLOS 2026, arXiv 2411.16102), as far as they are published as numbers."""

from __future__ import annotations

TABLE_1 = {512: (1.087, 1.317), 768: (1.537, 1.913), 1024: (2.005, 2.515)}
"""Batch -> measured ms per layer of GEMM and attention."""
TABLE_4 = {  # prefix sharing, compute density
    "sharegpt": (0.02, 3.12),
    "wildchat": (0.19, 2.13),
    "azure-code": (0.01, 33.2),
    "openvid": (0.00, 0.05),
    "burstgpt": (0.02, 17.78),
    "mmlu": (0.86, 54.91),
}
TRACES_OVER_DFS = "1.193 to 1.227, mean 1.208"
TRACES_OVER_DFS_70B = "mean 1.186"
OVER_VLLM_DFS = "up to 1.44"
BALANCE_OVER_DFS = {"trace-1": "loses", "trace-2": "loses", "trace-3": "wins", "trace-4": "wins"}
OPTIMUM_BLEND = {"llama-3-8b": 0.8655, "llama-3-70b": 0.908}
OPTIMUM_DFS = 0.717
GRID_BY_DENSITY = {
    0.80: 1.156,
    0.85: 1.148,
    0.90: 1.198,
    0.95: 1.166,
    1.00: 1.226,
    1.05: 1.254,
    1.10: 1.234,
    1.15: 1.256,
    1.20: 1.250,
    1.25: 1.238,
    1.30: 1.338,
    1.35: 1.234,
    1.40: 1.236,
}
GRID_RANGE = {
    "grid BurstGPT": "1.14 to 1.34, mean 1.2253",
    "grid Azure": "1.14 to 1.31",
    "grid ShareGPT": "1.08 to 1.17",
    "grid WildChat": "1.07 to 1.16",
}
MODELS_OVER_DFS = "mean 1.152, up to 1.244"
TABLE_3_TOKENS_PER_S = {"trace-1": 11080, "trace-2": 8408, "trace-3": 8403, "trace-4": 6325}
TABLE_3_SPEEDUP = {
    ("trace-1", 2): 1.85,
    ("trace-2", 2): 1.93,
    ("trace-3", 2): 1.85,
    ("trace-4", 2): 1.93,
    ("trace-1", 4): 3.78,
    ("trace-2", 4): 3.86,
    ("trace-3", 4): 3.81,
    ("trace-4", 4): 3.88,
}
DISAGGREGATED = "below vLLM per GPU"
SAMPLING = "1% like 100% on BurstGPT blends"
