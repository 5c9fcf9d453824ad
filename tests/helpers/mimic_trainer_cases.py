"""What the tests of `mimic_trainer` and their likes share."""

TEMPERATURE, KL_WEIGHT, LM_WEIGHT = 2.0, 0.7, 0.5


TERMS = {"temperature": TEMPERATURE, "kl_weight": KL_WEIGHT, "lm_weight": LM_WEIGHT}
