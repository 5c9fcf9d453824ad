"""What sampling refuses."""

import pytest

from llava_mod_hf.talking.sampling import Sampling


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_new_tokens": 0}, "`max_new_tokens` is 0"),
        ({"temperature": -1.0}, "`temperature` is -1.0"),
        ({"temperature": 1.0, "top_p": 0.0}, "`top_p` 0.0"),
        ({"temperature": 1.0, "top_k": -1}, "`top_k` -1"),
        ({"repetition_penalty": 0.0}, "`repetition_penalty` is 0.0"),
        ({"top_p": 0.5}, "`top_p` is 0.5, which does nothing without a `temperature`"),
        ({"top_k": 5}, "`top_k` is 5, which does nothing without a `temperature`"),
    ],
)
def test_what_has_no_effect_or_no_meaning_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**given)
