"""Recorded steps on the CUDA machine, with Triton's compiled kernels, against the CPU: run by `run.py`."""

import torch
from small import design, prompt, small_model

from clo.engine.decoder import Decoder

PROMPT, STEPS = 64, 6
DESIGNS = (
    design("clo", budget_pages=3),
    design("clo", budget_pages=3, transfer="page_copies", resolve_on="cpu"),
    design("resident-sparse", budget_pages=3),
)


def decoded(model, chosen, tokens):
    """Logits of each step."""
    with Decoder(model, chosen, max_new_tokens=STEPS) as decoder:
        rows = [decoder.prefill([tokens[:PROMPT]])[0].cpu()]
        rows += [decoder.step(token[None])[0].cpu().clone() for token in tokens[PROMPT:]]
    return torch.stack(rows)


def main():
    tokens, errors = prompt(PROMPT + STEPS), []
    for chosen in DESIGNS:
        expected, found = (decoded(model, chosen, tokens) for model in (small_model(), small_model().cuda()))
        errors.append(float((found - expected).abs().max()))
    assert max(errors) < 1e-4, errors
    print(f"largest error {max(errors):.2g}")


if __name__ == "__main__":
    main()
