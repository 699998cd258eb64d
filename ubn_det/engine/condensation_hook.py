"""Check UBN at the start of a run and follow its condensation during training."""

import logging
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import LoggerHook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ubn_det.layers import UBN, SyncUBN, UBN1d, UBN2d, UBN3d
from ubn_det.layers.ubn import COUNTERS, EXTRA_PARAMETERS
from ubn_det.reliability import ListedHook

# When data look condensed: in a window of so many iterations the gates of so many of the layers
# closed on so many batches, and on such a share of them. Of ordinary batches at most 1 % are
# closed in most layers; in 10,000 recorded iterations with 9 to 30 layers no layer came to five.
_WINDOW = 100
_SHARE_OF_LAYERS = 0.25
_CLOSED = 5
_SHARE_OF_BATCHES = 0.05

_TYPES = (UBN, UBN1d, UBN2d, UBN3d, SyncUBN)
_NAMES = (*(cls.__name__ for cls in _TYPES), 'WithUBN')


class _Counts(NamedTuple):
    """Counters of the layers that are followed, one entry for each."""

    tracked: list[int]
    condensed: list[int]
    readmitted: list[int]


class _Log(NamedTuple):
    """The counters at an iteration."""

    iteration: int
    counts: _Counts


@HOOKS.register_module()
class CondensationHook(ListedHook):
    """Log scores and gates of UBN, and say at the start of a run what it will do.

    Before the first iteration one line says how many UBN layers there are and how many of them
    train their statistics. At every log interval the visualizer gets, for each layer whose
    statistics train, ``condensation/<layer>``, the score of its last batch, and
    ``condensation_threshold/<layer>``, what the score of its next batch is held against, and
    ``condensed_share/<layer>``, the share of batches since the last log whose gate was closed, and
    the mean and the maximum of each over the layers as ``condensation/mean`` and so on. Nothing is
    read from the device between log intervals.

    Warns once per layer whose gate was closed ``patience`` batches in a row, and once in a run if
    its data look condensed: if within 100 iterations, or a log interval where that is longer, a
    quarter of the layers with ``condensation_threshold='auto'`` closed their gates on five batches
    and on 5 % of them.

    Args:
        interval (int, optional): Iterations between logs. None for that of LoggerHook.

    Raises:
        ValueError: ``interval`` is not positive.
        RuntimeError: At the start of a run: the config asks for UBN and something replaced it, or
            a top-level ``norm_cfg`` asks for it and has no effect.
    """

    priority = 'BELOW_NORMAL'

    def __init__(self, interval: int | None = None) -> None:
        if interval is not None and (not isinstance(interval, int) or interval < 1):
            raise ValueError(f'interval must be a positive integer or None, got {interval!r}')
        self.interval = interval
        self._layers: dict[str, UBN] = {}
        self._counts = _Counts([], [], [])
        self._starved: set = set()
        self._window: deque[_Log] = deque()
        self._has_named_data = False

    def before_run(self, runner: Runner) -> None:
        """Compare what the config asks for with what the model has."""
        super().before_run(runner)
        model = unwrap(runner.model)
        if not isinstance(runner.cfg.get('model'), dict):
            # Built by hand: nothing was asked for in a config.
            return
        asked = list(dict.fromkeys(_find_asked(runner.cfg.model)))
        for path in asked:
            _check_component(model, path, runner)
        top_level = runner.cfg.get('norm_cfg')
        if isinstance(top_level, dict) and _asks_for_ubn(top_level) and not asked:
            raise RuntimeError(
                "norm_cfg=dict(type='UBN') at the top level of a config that inherits its model "
                'changes nothing: the base config has already used its own norm_cfg. Set it '
                'where the norms are, for example model=dict(backbone=dict(norm_cfg=norm_cfg))'
            )

    def before_train(self, runner: Runner) -> None:
        """Say how many UBN layers train their statistics, and warn where few are meant to."""
        model = unwrap(runner.model)
        # The loop does the same right after this; only then does norm_eval show.
        model.train()
        layers = {name: m for name, m in model.named_modules() if isinstance(m, UBN)}
        if not layers:
            return
        self.interval = self.interval or _logger_interval(runner)
        self._layers = {
            name: m for name, m in layers.items() if m.training and m.track_running_stats
        }
        self._counts = self._read_counts()
        self._window = deque([_Log(runner.iter, self._counts)])
        plain = sum(isinstance(m, _BatchNorm) and not isinstance(m, UBN) for m in model.modules())
        num_stuck = sum(_is_stuck_at_identity(layer) for layer in layers.values())
        runner.logger.info(
            f'UBN: {len(layers)} layers ({sum(isinstance(m, SyncUBN) for m in layers.values())} '
            f'SyncUBN), {len(self._layers)} train their statistics, '
            f'{len(layers) - len(self._layers)} do not, {num_stuck} have their rectifiers '
            f'frozen at the identity; {plain} layers of plain BN left over'
        )
        causes = _find_causes(model)
        if not any(m.training for m in layers.values()):
            _warn(
                runner,
                f'All {len(layers)} UBN layers are in evaluation mode: they normalize with their '
                'running statistics, never move them and never look at the condensation score. '
                f'{causes}',
            )
        if num_stuck == len(layers):
            _warn(
                runner,
                f'The rectifiers of all {len(layers)} UBN layers are frozen at 0, so that they '
                "are plain BN for good. Set requires_grad=True in norm_cfg (a base config's "
                f'requires_grad=False is inherited unless norm_cfg has _delete_=True). {causes}',
            )
        for name, module in model.named_modules():
            if getattr(module, 'norm_eval', False) is True:
                ignored = [
                    n for n, m in module.named_modules() if isinstance(m, UBN) and m.training
                ]
                if ignored:
                    _warn(
                        runner,
                        f'norm_eval=True of {name or "the model"} ({type(module).__name__}) is '
                        f'ignored for its {len(ignored)} UBN layers, which train their '
                        'statistics: it looks for nn.BatchNorm2d only. Set norm_eval=False '
                        'there to say that this is meant, or use BN in that module',
                    )

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict[str, Any] | None = None,
    ) -> None:
        """Hand the scores and the shares to the visualizer at the log interval."""
        if not self._layers or not self._is_logged(runner, batch_idx) or not is_main_process():
            return
        before, self._counts = self._counts, self._read_counts()
        shares = {}
        for i, name in enumerate(self._layers):
            closed = self._counts.condensed[i] - before.condensed[i]
            total = closed + self._counts.tracked[i] - before.tracked[i]
            shares[name] = closed / total if total else 0.0
        scalars = {}
        scores, thresholds = self._read_scores()
        for tag, values in (
            ('condensation', scores),
            ('condensation_threshold', thresholds),
            ('condensed_share', shares),
        ):
            if values:
                scalars.update({f'{tag}/{name}': value for name, value in values.items()})
                scalars[f'{tag}/mean'] = sum(values.values()) / len(values)
                scalars[f'{tag}/max'] = max(values.values())
        runner.visualizer.add_scalars(scalars, step=runner.iter + 1)
        self._warn_starved(runner, before)
        self._warn_of_data(runner)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Give averaged weights the counters of the model that they are averages of.

        mmengine's averaged models copy integer buffers once, at the first step.
        """
        if 'ema_state_dict' not in checkpoint:
            return
        # EMAHook has swapped the two: the averages are the state dict that is saved.
        averaged, model = checkpoint['state_dict'], checkpoint['ema_state_dict']
        for name, module in unwrap(runner.model).named_modules():
            if isinstance(module, UBN):
                for counter in COUNTERS:
                    key = f'{name}.{counter}'
                    if key in averaged:
                        averaged[key] = model[f'module.{key}'].clone()

    def _is_logged(self, runner: Runner, batch_idx: int) -> bool:
        """Whether LoggerHook logs this iteration, if its interval is this one's."""
        dataloader = runner.train_dataloader
        short = len(dataloader) <= self.interval and self.end_of_epoch(dataloader, batch_idx)
        return short or self.every_n_inner_iters(batch_idx, self.interval)

    def _read_scores(self) -> tuple[dict[str, float], dict[str, float]]:
        """Read scores and thresholds of all layers that have them, in one transfer."""
        names, pairs = [], []
        for name, layer in self._layers.items():
            threshold = layer.threshold()
            if threshold is not None:
                score = layer.condensation.float()
                names.append(name)
                pairs.append(torch.stack([score, score.new_zeros(()) + threshold]))
        if not names:
            return {}, {}
        scores, thresholds = torch.stack(pairs, dim=1).tolist()
        return dict(zip(names, scores, strict=True)), dict(zip(names, thresholds, strict=True))

    def _read_counts(self) -> _Counts:
        """Read the counters of all layers in one transfer."""
        if not self._layers:
            return _Counts([], [], [])
        counters = [
            torch.stack([m.num_batches_tracked, m.num_batches_condensed, m.num_batches_readmitted])
            for m in self._layers.values()
        ]
        return _Counts(*torch.stack(counters, dim=1).tolist())

    def _warn_starved(self, runner: Runner, before: _Counts) -> None:
        starved = [
            name
            for name, old, new in zip(
                self._layers, before.readmitted, self._counts.readmitted, strict=True
            )
            if new > old and name not in self._starved
        ]
        if not starved:
            return
        self._starved.update(starved)
        for is_auto, what, advice in (
            (
                False,
                'one batch was let through to keep the running statistics from going stale',
                'If this goes on, raise condensation_threshold, or use larger batches',
            ),
            (
                True,
                'the change of the data was taken for a lasting one, and the threshold follows it',
                'If it is none, raise patience',
            ),
        ):
            names = [
                name
                for name in starved
                if (self._layers[name].condensation_threshold == 'auto') == is_auto
            ]
            if names:
                patience = sorted({self._layers[name].patience for name in names})
                _warn(
                    runner,
                    f'The gate was closed {" or ".join(map(str, patience))} batches in a row, so '
                    f'that {what}, in {", ".join(names)}. {advice}',
                )

    def _warn_of_data(self, runner: Runner) -> None:
        """Name the layers whose gates close together, once in a run."""
        if self._has_named_data:
            return
        now = _Log(runner.iter + 1, self._counts)
        window = self._window
        window.append(now)
        while len(window) > 2 and now.iteration - window[0].iteration > _WINDOW:
            window.popleft()
        first = window[0]
        names = list(self._layers)
        layers = [
            i
            for i, name in enumerate(names)
            if self._layers[name].condensation_threshold == 'auto'
        ]
        named = []
        for i in layers:
            closed = now.counts.condensed[i] - first.counts.condensed[i]
            total = closed + now.counts.tracked[i] - first.counts.tracked[i]
            if closed >= _CLOSED and closed >= _SHARE_OF_BATCHES * total:
                named.append(i)
        if not named or len(named) < _SHARE_OF_LAYERS * len(layers):
            return
        self._has_named_data = True
        # The last log before the first of these batches.
        since = max(
            log.iteration
            for log in window
            if all(log.counts.condensed[i] == first.counts.condensed[i] for i in named)
        )
        _warn(
            runner,
            f'The data look condensed since iteration {since}: the samples of many a batch are '
            'more alike than those of most, and such batches do not move the running statistics '
            f'of {", ".join(names[i] for i in named)}. Look at the data loader: is the order of '
            'samples random (sampler, shuffle=True), are images repeated, are they consecutive '
            'frames of one video or crops of one image? Batches that are not finite count too',
        )


def _warn(runner: Runner, message: str) -> None:
    runner.logger.log(logging.WARNING, message)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside of DistributedDataParallel and the like, or the model itself."""
    return model.module if is_model_wrapper(model) else model


def _logger_interval(runner: Runner) -> int:
    for hook in runner.hooks:
        if isinstance(hook, LoggerHook):
            return hook.interval
    return 50


def _asks_for_ubn(cfg: dict[str, Any]) -> bool:
    kind = cfg.get('type')
    # A scope may stand before the name, as in 'mmengine.UBN'.
    return kind in _TYPES or (isinstance(kind, str) and kind.split('.')[-1] in _NAMES)


def _find_asked(cfg: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path in the model config of each component that asks for UBN."""
    if isinstance(cfg, dict) and _asks_for_ubn(cfg):
        # The component is what the argument belongs to, be it one norm_cfg or a list of them.
        while path and path[-1].isdigit():
            path = path[:-1]
        yield path[:-1]
    elif isinstance(cfg, dict):
        for key, value in cfg.items():
            yield from _find_asked(value, (*path, key))
    elif isinstance(cfg, (list, tuple)):
        for i, value in enumerate(cfg):
            yield from _find_asked(value, (*path, str(i)))


def _check_component(model: nn.Module, path: tuple[str, ...], runner: Runner) -> None:
    """Raise if a component has BN where it asked for UBN; warn if it has no norm."""
    component = model
    for key in path:
        child = getattr(component, key, None)
        if not isinstance(child, nn.Module):
            # Config and module differ in structure from here on; what was found so far contains
            # the component.
            break
        component = child
    if any(isinstance(m, UBN) for m in component.modules()):
        return
    where = '.'.join(('model', *path))
    # Not by class: mmcv's SyncBatchNorm is none of torch's.
    replaced = {type(m).__name__ for m in component.modules() if hasattr(m, 'running_mean')}
    if not replaced:
        _warn(runner, f'{where} asks for UBN but has no norm layer')
        return
    raise RuntimeError(
        f'{where} asks for UBN but the model has {", ".join(sorted(replaced))} there: something '
        'replaced the layers. Remove sync_bn from the config, set use_syncbn=False where the '
        'detector has it, and use SyncUBN for statistics over all ranks'
    )


def _is_stuck_at_identity(layer: UBN) -> bool:
    extras = [p for p in (getattr(layer, name) for name in EXTRA_PARAMETERS) if p is not None]
    return bool(extras) and not any(p.requires_grad or p.any() for p in extras)


def _find_causes(model: nn.Module) -> str:
    """Name the settings that put norms in evaluation mode or freeze them."""
    settings: list[str] = []
    for name, module in model.named_modules():
        if getattr(module, 'norm_eval', False) is True:
            settings.append(f'{name}.norm_eval=True (set norm_eval=False)')
        frozen_stages = getattr(module, 'frozen_stages', -1)
        if isinstance(frozen_stages, int) and frozen_stages >= 0:
            settings.append(f'{name}.frozen_stages={frozen_stages} (set frozen_stages=-1)')
    return f'Found: {"; ".join(f"model.{s}" for s in settings)}' if settings else ''
