"""Who judges answers, for the measures that need a judge: the options of `evaluate` and what they make."""

from dataclasses import dataclass

from llava_mod_hf.evaluation.benchmarks import BENCHMARKS
from llava_mod_hf.evaluation.judges import LocalJudge, ServerJudge
from llava_mod_hf.evaluation.verdict_file import Verdicts, read_prompt, verdicts_path
from llava_mod_hf.fingerprints import content_hash

BATCH_SIZE = 8


@dataclass
class JudgeArguments:
    """
    Who judges answers.

    Args:
        judge (`str`, *optional*): a chat model, for `mmhal`: a folder, a name of the Hub, or that by which a server
            knows it. Its verdicts are kept beside the results, in `results.verdicts.jsonl`, and not asked for again.
        judge_revision (`str`, *optional*): its commit on the Hub; of a server's, what is kept apart by.
        judge_url (`str`, *optional*): of a server that speaks OpenAI's protocol, such as `http://localhost:8000/v1`. A
            key that it asks for is `JUDGE_API_KEY` of the environment.
        judge_prompt (`str`, *optional*): a text file with four `{}`, in place of the measure's own prompt.
        judge_max_new_tokens (`int`, *optional*, defaults to 1024): where a verdict without an end is cut.
        judge_batch_size (`int`, *optional*): verdicts that a local judge writes at a time, by default 8.
    """

    judge: str | None = None
    judge_revision: str | None = None
    judge_url: str | None = None
    judge_prompt: str | None = None
    judge_max_new_tokens: int = 1024
    judge_batch_size: int | None = None

    def __post_init__(self):
        names = ("judge_revision", "judge_url", "judge_prompt", "judge_batch_size")
        given = [name for name in names if getattr(self, name) is not None]
        if given and not self.judge:
            raise ValueError(f"`{given[0]}` is `{getattr(self, given[0])}`, and no `judge` is named: give both.")
        for name in ("judge_max_new_tokens", "judge_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` is {value}: give at least 1.")
        if self.judge_url and self.judge_batch_size:
            raise ValueError(
                f"`judge_batch_size` is {self.judge_batch_size}, and `judge_url` names a server, which is asked one by "
                "one: leave one of them out."
            )

    def make(self, measures, results, device=None):
        """
        Args:
            measures (`list[str]`): that answers are measured by.
            results (`Path`): the file that the verdicts are beside.
            device (`str`, *optional*): where a local judge goes.

        Returns:
            [`~llava_mod_hf.evaluation.verdict_file.Verdicts`], or `None` where no measure needs them.

        Raises:
            ValueError: if a measure needs a judge and none is given, or the other way round, or it cannot be one.
        """
        judged = [name for name in measures if BENCHMARKS[name].judged]
        if judged and not self.judge:
            raise ValueError(f"`measures` name `{judged[0]}`, which asks a judge, and none is named: give `judge`.")
        if not judged:
            if self.judge:
                known = ", ".join(name for name, each in BENCHMARKS.items() if each.judged)
                raise ValueError(f"`judge` is `{self.judge}`, which does nothing without a measure of {known}.")
            return None
        prompt = read_prompt(self.judge_prompt) if self.judge_prompt else None
        options = {"revision": self.judge_revision, "max_new_tokens": self.judge_max_new_tokens}
        if self.judge_url:
            judge = ServerJudge(self.judge, url=self.judge_url, **options)
        else:
            judge = LocalJudge(self.judge, batch_size=self.judge_batch_size or BATCH_SIZE, device=device, **options)
        return Verdicts(judge, verdicts_path(results), prompt)


def unasked(prompt, fields):
    """Takes the judge's place before there are answers: a verdict without a rating for each."""
    return [""] * len(fields)


def judge_of(verdicts):
    """`dict`: who judged and by which prompt, for the results' `setup`; empty without a judge."""
    if verdicts is None:
        return {}
    prompt = verdicts.prompt and content_hash(verdicts.prompt)
    return {"judge": verdicts.judge.told | verdicts.judge.identity | {"prompt": prompt}}
