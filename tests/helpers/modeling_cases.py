"""What the tests of `modeling` and their likes share."""

QUESTIONS = ["is there a red circle?", "what color is it?", "what shape is the blue shape?", "?"]
