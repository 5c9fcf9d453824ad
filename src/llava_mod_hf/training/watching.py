"""What all trainers of this package show and keep of a run while it trains."""

from llava_mod_hf.training.progress import ShowsProgress
from llava_mod_hf.training.router_health import WatchesRouters
from llava_mod_hf.training.run_lines import BeginsLines


class Watched(ShowsProgress, WatchesRouters):
    """[`~llava_mod_hf.training.progress.ShowsProgress`], [`~llava_mod_hf.training.router_health.WatchesRouters`]."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(BeginsLines)
