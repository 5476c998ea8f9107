"""Multiple choice by log probability: which answer does the model find most likely? Questions are read once.

python examples/multiple_choice.py [MODEL]
"""

import sys

from blendserve import LLM, RequestOutput, SamplingParams

QUESTIONS = [
    ("The capital of France is", [" Paris.", " Rome.", " Madrid."]),
    ("Water freezes at a temperature of", [" zero degrees Celsius.", " ninety degrees Celsius."]),
    ("A triangle has", [" three sides.", " four sides.", " nine sides."]),
]


def score(output: RequestOutput, num_question_tokens: int) -> float:
    """The mean log probability of the tokens behind the question: long answers must not lose for their length."""
    scored = [token.logprob for token in (output.prompt_logprobs or ())[num_question_tokens:] if token is not None]
    return sum(scored) / len(scored)


def main() -> None:
    with LLM(sys.argv[1] if len(sys.argv) > 1 else None) as llm:
        prompts = [question + choice for question, choices in QUESTIONS for choice in choices]
        outputs = iter(llm.generate(prompts, SamplingParams(max_tokens=0, prompt_logprobs=0)))
        for question, choices in QUESTIONS:
            num_question_tokens = len(llm.model.tokenizer.encode(question))
            scores = [score(next(outputs), num_question_tokens) for _ in choices]
            best = max(range(len(choices)), key=scores.__getitem__)
            print(f"{question}{choices[best]} ({', '.join(f'{value:.2f}' for value in scores)})")
        print(f"{llm.stats.num_cached_tokens} of {llm.stats.num_prompt_tokens} prompt tokens were shared")


if __name__ == "__main__":
    main()
