"""Train an adapter and serve it in one process: every some steps the engine answers with the weights of that step.

    python scripts/train_and_serve.py --data instructions.json --model smollm2-135m-instruct --every 50

The engine is not restarted and compiles nothing: the adapter is read again into its slot.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from jaxllm import LLM, SamplingParams
from jaxllm.adapters.lora_request import LoRARequest
from jaxllm.training.config import TrainConfig
from jaxllm.training.run import train


def main() -> None:
    """Print one JSON object per update: the step and the answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--question", default="Rewrite the sentence in passive voice: The cat chased the mouse.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, LLM(args.model, enable_lora=True, max_lora_rank=args.rank) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=48)
        messages = [{"role": "user", "content": args.question}]

        def answer(step: int, write) -> None:
            if step % args.every:
                return
            path = Path(folder) / f"step-{step}"
            write(path)
            request = LoRARequest("training", step + 1, str(path))
            (output,) = llm.chat(messages, params, use_tqdm=False, lora_request=request)
            print(json.dumps({"step": step, "answer": output.outputs[0].text}), flush=True)

        config = TrainConfig(
            task="sft",
            data=args.data,
            model=args.model,
            output=str(Path(folder) / "run"),
            steps=args.steps,
            lora_rank=args.rank,
            sample_every=0,
            plot=False,
            save_every=args.steps,
            eval_every=args.steps,
        )
        train(config, on_step=answer)


if __name__ == "__main__":
    main()
