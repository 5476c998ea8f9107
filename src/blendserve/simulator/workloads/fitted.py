"""Fitted statistics of published traces: quantiles, correlations and prefix structure; no row of any trace.

Printed by `bench/fit_traces.py`. Sources: ShareGPT first turns (efeslab/Nanoflow, Apache-2.0; Llama-2 counts scaled by
0.817 and 0.801 to Llama-3), Azure LLM inference trace, code (Azure/AzurePublicDataset, CC-BY-4.0), BurstGPT API and
conversation logs (CC-BY-4.0), MMLU five-shot prompts (hendrycks/test, MIT). Lengths beyond 8192 tokens are cut to it.
"""

from __future__ import annotations

from typing import NamedTuple

PROBABILITIES = (
    0,
    0.01,
    0.02,
    0.05,
    0.1,
    0.15,
    0.2,
    0.25,
    0.3,
    0.35,
    0.4,
    0.45,
    0.5,
    0.55,
    0.6,
    0.65,
    0.7,
    0.75,
    0.8,
    0.85,
    0.9,
    0.92,
    0.94,
    0.95,
    0.96,
    0.97,
    0.98,
    0.99,
    0.995,
    0.998,
    0.999,
    0.9995,
    1,
)


class LengthFit(NamedTuple):
    """Quantiles at `PROBABILITIES` of input and output tokens, and the correlation of their Gaussian copula."""

    prompt_quantiles: tuple[float, ...]
    output_quantiles: tuple[float, ...]
    correlation: float


class SubjectFit(NamedTuple):
    """One MMLU subject: its test questions, the tokens of its five-shot prefix, and quantiles of the tokens after
    it."""

    num_questions: int
    num_prefix_tokens: int
    question_quantiles: tuple[float, ...]


SHAREGPT = LengthFit(
    prompt_quantiles=(
        1,
        2,
        2,
        6,
        7,
        9,
        11,
        13,
        15,
        17,
        20,
        25,
        30,
        38,
        48,
        65,
        88,
        133,
        214,
        372,
        689,
        893,
        1142,
        1335,
        1585,
        1906,
        2259,
        2876,
        3641,
        4941,
        7208,
        8192,
        8192,
    ),
    output_quantiles=(
        1,
        4,
        7,
        16,
        32,
        58,
        83,
        106,
        131,
        156,
        181,
        204,
        226,
        249,
        272,
        298,
        326,
        360,
        402,
        462,
        551,
        601,
        648,
        680,
        708,
        740,
        770,
        807,
        842,
        888,
        940,
        1291,
        8192,
    ),
    correlation=0.053,
)
AZURE_CODE = LengthFit(
    prompt_quantiles=(
        3,
        17,
        35,
        75,
        147,
        232,
        386,
        578,
        770,
        939,
        1075,
        1261,
        1469,
        1690,
        1909,
        2164,
        2433,
        2744,
        3192,
        3920,
        5188,
        5959,
        6585,
        7303,
        7430,
        7435,
        7436,
        7436,
        7436,
        7436,
        7437,
        7437,
        7437,
    ),
    output_quantiles=(
        6,
        6,
        6,
        6,
        7,
        7,
        8,
        9,
        9,
        10,
        11,
        12,
        13,
        14,
        16,
        18,
        20,
        24,
        29,
        39,
        55,
        65,
        79,
        90,
        105,
        128,
        171,
        251,
        359,
        670,
        825,
        885,
        1899,
    ),
    correlation=-0.021,
)
BURSTGPT_API = LengthFit(
    prompt_quantiles=(
        58,
        59,
        59,
        60,
        61,
        62,
        62,
        63,
        64,
        66,
        67,
        70,
        124,
        177,
        195,
        211,
        212,
        242,
        263,
        271,
        349,
        433,
        437,
        440,
        457,
        457,
        692,
        692,
        692,
        692,
        692,
        692,
        692,
    ),
    output_quantiles=(
        1,
        1,
        1,
        1,
        1,
        1,
        1,
        1,
        3,
        3,
        3,
        3,
        3,
        3,
        3,
        4,
        4,
        4,
        4,
        4,
        7,
        7,
        7,
        7,
        7,
        7,
        8,
        8,
        8,
        14,
        16,
        18,
        19,
    ),
    correlation=0.006,
)
BURSTGPT_CONVERSATION = LengthFit(
    prompt_quantiles=(
        10,
        13,
        14,
        18,
        23,
        35,
        46,
        73,
        103,
        149,
        210,
        283,
        382,
        464,
        534,
        627,
        822,
        939,
        1068,
        1284,
        1446,
        1536,
        1626,
        1640,
        1718,
        1802,
        1869,
        1959,
        1994,
        2031,
        2078,
        2102,
        2126,
    ),
    output_quantiles=(
        2,
        5,
        11,
        14,
        19,
        30,
        45,
        68,
        86,
        129,
        180,
        209,
        239,
        267,
        297,
        326,
        350,
        382,
        422,
        481,
        567,
        618,
        701,
        736,
        865,
        1001,
        1217,
        1424,
        1702,
        1935,
        1977,
        1998,
        2019,
    ),
    correlation=0.252,
)
SUBJECT_PROBABILITIES = (0, 0.25, 0.5, 0.75, 0.95, 1)
MMLU_SUBJECTS = (  # tokens of questions per character: 0.875 of the examples'
    SubjectFit(107, 304, (20, 38, 50, 66, 77, 98)),  # abstract_algebra
    SubjectFit(128, 271, (35, 49, 58, 75, 105, 129)),  # anatomy
    SubjectFit(140, 495, (27, 47, 66, 83, 108, 169)),  # astronomy
    SubjectFit(112, 494, (22, 37, 55, 78, 96, 122)),  # business_ethics
    SubjectFit(265, 312, (29, 46, 56, 69, 93, 139)),  # clinical_knowledge
    SubjectFit(144, 386, (28, 43, 59, 85, 143, 195)),  # college_biology
    SubjectFit(100, 458, (26, 47, 66, 88, 140, 184)),  # college_chemistry
    SubjectFit(100, 718, (29, 57, 80, 120, 183, 207)),  # college_computer_science
    SubjectFit(99, 502, (24, 52, 72, 92, 124, 164)),  # college_mathematics
    SubjectFit(162, 393, (15, 37, 58, 95, 179, 957)),  # college_medicine
    SubjectFit(114, 416, (12, 50, 70, 84, 99, 123)),  # college_physics
    SubjectFit(100, 297, (29, 36, 46, 77, 139, 219)),  # computer_security
    SubjectFit(235, 252, (14, 28, 33, 41, 58, 80)),  # conceptual_physics
    SubjectFit(114, 499, (36, 70, 92, 125, 168, 195)),  # econometrics
    SubjectFit(145, 367, (31, 42, 47, 57, 77, 95)),  # electrical_engineering
    SubjectFit(378, 473, (9, 24, 38, 54, 87, 143)),  # elementary_mathematics
    SubjectFit(126, 493, (19, 52, 87, 107, 176, 220)),  # formal_logic
    SubjectFit(100, 336, (21, 30, 32, 43, 70, 129)),  # global_facts
    SubjectFit(318, 423, (25, 48, 68, 92, 141, 179)),  # high_school_biology
    SubjectFit(196, 403, (21, 49, 68, 92, 148, 187)),  # high_school_chemistry
    SubjectFit(100, 712, (59, 88, 125, 169, 249, 427)),  # high_school_computer_science
    SubjectFit(165, 2494, (73, 185, 265, 385, 485, 588)),  # high_school_european_history
    SubjectFit(202, 313, (19, 31, 37, 49, 66, 124)),  # high_school_geography
    SubjectFit(193, 385, (28, 47, 60, 74, 99, 157)),  # high_school_government_and_politics
    SubjectFit(391, 303, (15, 37, 47, 62, 87, 120)),  # high_school_macroeconomics
    SubjectFit(270, 460, (15, 38, 50, 67, 99, 161)),  # high_school_mathematics
    SubjectFit(238, 316, (26, 48, 61, 75, 118, 160)),  # high_school_microeconomics
    SubjectFit(160, 409, (40, 76, 93, 121, 175, 264)),  # high_school_physics
    SubjectFit(539, 421, (18, 37, 48, 67, 108, 212)),  # high_school_psychology
    SubjectFit(216, 657, (22, 70, 96, 126, 172, 340)),  # high_school_statistics
    SubjectFit(204, 1942, (92, 215, 258, 302, 381, 471)),  # high_school_us_history
    SubjectFit(237, 1140, (51, 170, 248, 353, 523, 670)),  # high_school_world_history
    SubjectFit(223, 249, (29, 38, 44, 54, 72, 89)),  # human_aging
    SubjectFit(134, 270, (23, 37, 46, 65, 94, 186)),  # human_sexuality
    SubjectFit(121, 542, (27, 63, 81, 92, 118, 153)),  # international_law
    SubjectFit(108, 310, (29, 51, 65, 80, 111, 167)),  # jurisprudence
    SubjectFit(163, 374, (23, 34, 50, 78, 110, 149)),  # logical_fallacies
    SubjectFit(105, 544, (15, 41, 53, 68, 93, 141)),  # machine_learning
    SubjectFit(103, 230, (22, 29, 34, 41, 53, 72)),  # management
    SubjectFit(234, 336, (24, 37, 44, 54, 83, 100)),  # marketing
    SubjectFit(100, 285, (15, 28, 35, 47, 61, 84)),  # medical_genetics
    SubjectFit(790, 233, (26, 35, 41, 51, 95, 259)),  # miscellaneous
    SubjectFit(347, 377, (2, 64, 77, 94, 116, 161)),  # moral_disputes
    SubjectFit(898, 475, (66, 74, 78, 83, 92, 114)),  # moral_scenarios
    SubjectFit(303, 477, (20, 36, 50, 74, 112, 140)),  # nutrition
    SubjectFit(311, 261, (22, 36, 44, 56, 118, 209)),  # philosophy
    SubjectFit(324, 434, (20, 39, 52, 67, 104, 149)),  # prehistory
    SubjectFit(282, 548, (35, 72, 88, 111, 150, 196)),  # professional_accounting
    SubjectFit(1534, 1404, (2, 155, 205, 266, 399, 699)),  # professional_law
    SubjectFit(282, 917, (44, 101, 148, 191, 297, 372)),  # professional_medicine
    SubjectFit(624, 473, (41, 61, 77, 100, 147, 254)),  # professional_psychology
    SubjectFit(112, 341, (17, 30, 38, 54, 99, 180)),  # public_relations
    SubjectFit(245, 1007, (15, 79, 119, 190, 258, 384)),  # security_studies
    SubjectFit(202, 369, (21, 47, 57, 68, 95, 128)),  # sociology
    SubjectFit(100, 350, (29, 43, 53, 63, 81, 99)),  # us_foreign_policy
    SubjectFit(165, 277, (21, 35, 42, 53, 72, 321)),  # virology
    SubjectFit(171, 219, (21, 29, 33, 37, 48, 69)),  # world_religions
)
