"""How answers are sampled: options that hold values and check them, so that `--help` imports little."""

from dataclasses import dataclass


@dataclass
class Sampling:
    """
    How answers are sampled, whatever the checkpoint's `generation_config` says.

    Args:
        max_new_tokens (`int`, *optional*, defaults to 256): where an answer without an end is cut.
        temperature (`float`, *optional*, defaults to 0.0): of the sampling; 0 takes the most likely token.
        top_p (`float`, *optional*, defaults to 1.0): sample among the most likely tokens of this total probability.
        top_k (`int`, *optional*, defaults to 0): sample among so many of the most likely tokens; 0 for all.
        repetition_penalty (`float`, *optional*, defaults to 1.0): above 1, tokens that were there become less likely.
        seed (`int`, *optional*, defaults to 0): of the sampling: the same conversation gets the same answer.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` is {self.max_new_tokens}: give at least 1.")
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(
                f"`temperature` is {self.temperature}, `top_p` {self.top_p} and `top_k` {self.top_k}: give a "
                "temperature and a `top_k` of at least 0, and a `top_p` above 0 and of at most 1."
            )
        if self.repetition_penalty <= 0:
            raise ValueError(f"`repetition_penalty` is {self.repetition_penalty}: give a number above 0, 1 for none.")
        for name, nothing in (("top_p", 1.0), ("top_k", 0)):
            if self.temperature == 0 and getattr(self, name) != nothing:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)}, which does nothing without a `temperature` above 0: give "
                    "both, or neither."
                )
