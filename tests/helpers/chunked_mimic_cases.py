"""What the tests of `chunked_mimic` and their likes share."""

import torch

ROWS, WIDTH, TEACHER_WIDTH, VOCABULARY, SHARED = 7, 4, 6, 9, 8


def tensors(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "hidden": randn(ROWS, WIDTH),
        "weight": randn(VOCABULARY, WIDTH),
        "bias": randn(VOCABULARY),
        "teacher": randn(ROWS, TEACHER_WIDTH),
        "teacher_weight": randn(VOCABULARY + 2, TEACHER_WIDTH),
        "targets": torch.randint(VOCABULARY, (ROWS,), generator=generator),
    }
