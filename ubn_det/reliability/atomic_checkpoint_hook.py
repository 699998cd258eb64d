"""Checkpoints that a full disk or a kill cannot harm, and that are loaded whole or not at all."""

import os
import re
from typing import Any

from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

PURPOSES = ('resume', 'test')
# The end of the name under which a process writes beside a file. A kill leaves it there.
_UNFINISHED = '.unfinished'
# What a run is more than its weights.
_RUN_STATE = ('meta', 'message_hub', 'optimizer')
# By the class of a layer that extends a plain one: the parameters and the buffers that it adds.
_extensions: dict[type[nn.Module], tuple[tuple[str, ...], tuple[str, ...]]] = {}


def register_extension(
    layer: type[nn.Module], parameters: tuple[str, ...], buffers: tuple[str, ...]
) -> None:
    """Make a layer known that does what a plain one does until it has learnt something else.

    Weights of the plain one are whole for it, but not the other way round.

    Args:
        layer (type[nn.Module]): Its class.
        parameters (tuple[str, ...]): Names of the parameters that it adds to the plain one's.
        buffers (tuple[str, ...]): Names of the buffers that it adds.
    """
    _extensions[layer] = (parameters, buffers)


@register_backend('atomic_local', force=True)
class AtomicLocalBackend(LocalBackend):
    """Local disk; a file that is written has its old content or its new one, never a part."""

    def put(self, obj: bytes, filepath: str | os.PathLike) -> None:
        """Write bytes to a file.

        Args:
            obj (bytes): Content.
            filepath (str | PathLike): File; its folder is made if need be.

        Raises:
            OSError: It could not be written; what was there before still is.
        """
        path = os.path.abspath(filepath)
        folder = os.path.dirname(path)
        os.makedirs(folder, exist_ok=True)
        temporary = f'{path}.{os.getpid()}{_UNFINISHED}'
        try:
            with open(temporary, 'wb') as file:
                file.write(obj)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            if os.path.exists(temporary):
                os.remove(temporary)
            raise type(error)(
                error.errno,
                f'{error.strerror}: {path} was not written, what was there before is intact',
            ) from error
        # The new name has to survive a crash of the machine as well.
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def put_text(self, obj: str, filepath: str | os.PathLike, encoding: str = 'utf-8') -> None:
        """Write text to a file, as ``put`` does."""
        self.put(obj.encode(encoding), filepath)

    @staticmethod
    def remove_unfinished(folder: str) -> list[str]:
        """Remove what processes that were killed while they wrote have left in a folder.

        A process that is writing there at this moment gets an error instead of its file.

        Returns:
            list[str]: The names of what was removed.
        """
        names = os.listdir(folder) if os.path.isdir(folder) else []
        found = [name for name in names if re.search(rf'\.\d+\{_UNFINISHED}$', name)]
        for name in found:
            os.remove(os.path.join(folder, name))
        return found


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook that never puts what is saved at risk for what is being saved.

    mmengine removes the checkpoint that ``max_keep_ckpts`` leaves no room for before it writes the
    next one, and writes in place: a full disk or a kill in between may leave none that can be
    read. Here a file is written beside and renamed once it is whole, and only then the outdated
    one is removed. What a kill leaves half written goes at the start of the next training.

    It also compares what is loaded with the model before any of it is copied; mmengine leaves out
    what does not fit and goes on with a warning.

    Args:
        *args: As in CheckpointHook.
        purpose (str, optional): What checkpoints are loaded for. 'resume': to go on with a run;
            then the model has to be the same, and the state of the optimizer has to be there.
            'test': then nothing of the model may be missing. None: to start from, as with
            ``load_from``, where parts may be left out, as heads for other classes are; only
            mmengine's warning says so.
        **kwargs: As in CheckpointHook.

    Raises:
        ValueError: ``purpose`` is none of these.
        RuntimeError: On loading: the checkpoint does not serve the purpose; names the keys.
        OSError: On saving: a file could not be written.
    """

    def __init__(self, *args: Any, purpose: str | None = None, **kwargs: Any) -> None:
        if purpose not in (None, *PURPOSES):
            raise ValueError(f'purpose must be None or one of {PURPOSES}, got {purpose!r}')
        super().__init__(*args, **kwargs)
        self.purpose = purpose
        is_local = '://' not in (self.out_dir or '')
        if is_local and self.file_client_args is None and self.backend_args is None:
            self.backend_args = dict(backend='atomic_local')

    def before_train(self, runner: Runner) -> None:
        """Remove what a killed run has left half written, so that kills do not fill the disk."""
        super().before_train(runner)
        if not is_main_process():
            return
        folders = {runner.work_dir}
        if isinstance(self.file_backend, AtomicLocalBackend):
            folders.add(self.out_dir)
        for folder in folders:
            for name in AtomicLocalBackend.remove_unfinished(folder):
                runner.logger.info(f'Removed {folder}/{name}, which a kill left half written')

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict[str, Any]) -> None:
        outdated = None
        if self.max_keep_ckpts > 0 and list(self.keep_ckpt_ids)[-1:] != [step]:
            if len(self.keep_ckpt_ids) == self.max_keep_ckpts:
                outdated = self.keep_ckpt_ids.popleft()
            self.keep_ckpt_ids.append(step)
            runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))

        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            name,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if not is_main_process():
            return
        AtomicLocalBackend().put_text(
            self.last_ckpt, os.path.join(runner.work_dir, 'last_checkpoint')
        )
        if outdated is not None:
            self._remove(
                self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(outdated))
            )

    def _save_best_checkpoint(self, runner: Runner, metrics: dict[str, Any]) -> None:
        # The base class removes the best one so far, where it knows of one, before it writes.
        before = self._best_paths()
        self._set_best_paths(dict.fromkeys(before))
        try:
            super()._save_best_checkpoint(runner, metrics)
        finally:
            after = self._best_paths()
            self._set_best_paths({key: path or before.get(key) for key, path in after.items()})
        if is_main_process():
            for key, path in before.items():
                if path and after.get(key) and path != after[key]:
                    self._remove(path)

    def _best_paths(self) -> dict[str, str | None]:
        """Return the best checkpoint so far by each key; there may be none."""
        if self.save_best is None:
            return {}
        if len(self.key_indicators) == 1:
            return {'': self.best_ckpt_path}
        return dict(self.best_ckpt_path_dict)

    def _set_best_paths(self, paths: dict[str, str | None]) -> None:
        if '' in paths:
            self.best_ckpt_path = paths['']
        elif paths:
            self.best_ckpt_path_dict.update(paths)

    def _remove(self, path: str) -> None:
        if self.file_backend.isfile(path):
            self.file_backend.remove(path)
        elif self.file_backend.isdir(path):
            # Those of sharded models are folders.
            self.file_backend.rmtree(path)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Raise if the checkpoint does not serve its purpose; nothing has been copied yet."""
        if self.purpose is not None:
            check_fit(runner.model, checkpoint, self.purpose)


def check_fit(model: nn.Module, checkpoint: dict[str, Any], purpose: str) -> None:
    """Raise if a checkpoint does not fit a model.

    Args:
        model (nn.Module): Model, wrapped or not.
        checkpoint (dict): What ``torch.load`` gave.
        purpose (str): 'resume' or 'test', as in AtomicCheckpointHook.

    Raises:
        RuntimeError: It does not; names the keys and the way out.
    """
    if not isinstance(checkpoint, dict):
        raise RuntimeError(f'the checkpoint holds a {type(checkpoint).__name__}, not a state dict')
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    if purpose == 'resume':
        lacking = [key for key in _RUN_STATE if key not in checkpoint]
        if lacking:
            raise RuntimeError(
                f'cannot resume: the checkpoint has no {" and no ".join(lacking)}, as one that '
                'was saved as the best or made for publishing. Resume from the last one, or '
                'start from its weights with load_from'
            )
    saved = {
        re.sub(r'^module\.', '', key): value
        for key, value in checkpoint.get('state_dict', checkpoint).items()
    }
    own = model.state_dict()
    faults = [
        f'{key} is {_shape(saved[key])} in the checkpoint, {_shape(value)} in the model'
        for key, value in own.items()
        if key in saved and _shape(saved[key]) != _shape(value)
    ]
    missing = [key for key in own if key not in saved]
    unexpected = [key for key in saved if key not in own]
    if purpose == 'test':
        # Weights of a plain layer make one that extends it that plain one, but not the other way
        # round. A part that the model lacks as a whole, such as a head, may be in the checkpoint.
        identity = set(_identity_keys(model, saved))
        missing = [k for k in missing if k not in identity and 'num_batches_tracked' not in k]
        extra = tuple(name for parameters, _ in _extensions.values() for name in parameters)
        unexpected = [
            k for k in unexpected if k.endswith(extra) and f'{k.rpartition(".")[0]}.bias' in own
        ]
    faults += [f'{key} is missing in the checkpoint' for key in missing]
    faults += [f'{key} is in the checkpoint only' for key in unexpected]
    if not faults:
        return
    more = f'\n  and {len(faults) - 10} more' if len(faults) > 10 else ''
    raise RuntimeError(
        f'cannot {purpose}: the checkpoint is not one of this model, nothing was loaded. Use the '
        'config that it was trained with'
        + (', or start from its weights with load_from' if purpose == 'resume' else '')
        + ':\n  '
        + '\n  '.join(faults[:10])
        + more
    )


def _shape(value: Any) -> Any:
    shape = getattr(value, 'shape', None)
    return f'a {type(value).__name__}' if shape is None else tuple(shape)


def _identity_keys(model: nn.Module, saved: dict[str, Any]) -> list[str]:
    """Return the keys that an extending layer fills by itself where the plain one's are there."""
    return [
        f'{name}.{extra}'
        for name, layer in model.named_modules()
        for cls, (parameters, buffers) in _extensions.items()
        if isinstance(layer, cls)
        and (f'{name}.running_mean' in saved or f'{name}.weight' in saved)
        for extra in parameters + buffers
    ]
