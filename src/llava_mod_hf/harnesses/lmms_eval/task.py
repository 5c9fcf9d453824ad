"""A task of lmms-eval whose rows are read as `llava-mod evaluate` reads them."""

from lmms_eval.api.task import ConfigurableMessagesTask

from llava_mod_hf.harnesses.tasks import load


class LlavaModTask(ConfigurableMessagesTask):
    """
    Args:
        config (`dict`): the task's file, with what [`~llava_mod_hf.harnesses.tasks.load`] takes as `dataset_kwargs`.
    """

    def __init__(self, config):
        super().__init__(config={name: value for name, value in config.items() if name != "class"})

    # the parent's goes to the Hub, and tries again five times whatever is wrong
    def download(self, dataset_kwargs=None):
        self.dataset = load(**dataset_kwargs)
        self.dataset_no_image = self.dataset.remove_columns("images")
