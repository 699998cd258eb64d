"""Warn where a config's list of hooks has taken the place of its base's."""

import os
from typing import Any

from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner


class ListedHook(Hook):
    """A hook that users put into configs, and that notices what a list of hooks costs.

    mmengine merges dicts of a config and its base, but not lists: ``custom_hooks = [...]`` in a
    child of RTMDet or YOLOX drops the base's EMAHook and others without a word. At the start of a
    run the first hook of this kind warns where one of them came in by such a list. Entries of
    ``default_hooks`` add to those of the base.
    """

    def before_run(self, runner: Runner) -> None:
        """Compare the config's list with those of the files that it is based on."""
        is_first = self is next((h for h in runner.hooks if isinstance(h, ListedHook)), None)
        if not is_first or not is_main_process():
            return
        listed = _names(runner.cfg)
        files = [runner.cfg.filename] if runner.cfg.filename else []
        dropped = _find_dropped(listed, files) - listed
        if dropped:
            own = sorted(listed & _own_names())
            runner.logger.warning(
                f'custom_hooks with {" and ".join(own)} takes the place of the list of a base '
                f'config, whose {" and ".join(sorted(dropped))} will not run. Move {own[0]} to '
                f'default_hooks=dict(any_name=dict(type={own[0]!r})), which adds to those of the '
                'base, or repeat the hooks of the base in the list'
            )


def _own_names() -> set[str]:
    return {cls.__name__ for cls in ListedHook.__subclasses__()}


def _names(cfg: Config) -> set[str]:
    """Return the types of the hooks of a config's list, without their scopes."""
    kinds: list[Any] = [hook.get('type') for hook in cfg.get('custom_hooks') or [] if hook]
    return {getattr(kind, '__name__', str(kind)).split('.')[-1] for kind in kinds}


def _find_dropped(listed: set[str], files: list[str]) -> set[str]:
    """Return the hooks of the lists of some config files that a list with one of ours lacks.

    Args:
        listed (set[str]): Names of the hooks of a config's list.
        files (list[str]): The config's own file, or the bases of a file.
    """
    dropped: set[str] = set()
    if not listed & _own_names():
        return dropped
    for file in files:
        # That of a config that was moved or built by hand is not there.
        if os.path.isfile(file):
            below = _names(Config.fromfile(file, import_custom_modules=False))
            bases = [Config._get_cfg_path(base, file)[0] for base in Config._get_base_files(file)]
            dropped |= (below - listed) | _find_dropped(below, bases)
    return dropped
