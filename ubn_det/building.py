"""Build a model that has UBN in the place of its BN, from a config that knows nothing of it."""

from typing import Any

from mmengine.registry import MODELS
from torch import nn

from .conversion import convert
from .layers import UBN

_BN_TYPES = (
    *('BN', 'BN1d', 'BN2d', 'BN3d', 'SyncBN', 'MMSyncBN'),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
)


@MODELS.register_module(name='WithUBN')
def build_with_ubn(
    model_type: str | type[nn.Module], norm_cfg: dict[str, Any] | None = None, **model: Any
) -> nn.Module:
    """Build a model of any library on mmengine, then turn all of its BN layers into UBN.

    In a config it is the ``type`` of the model, whose own type moves to ``model_type``; everything
    else stays where it is::

        _base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
        custom_imports = dict(imports=['ubn_det'])
        model = dict(
            type='WithUBN', model_type='RetinaNet', norm_cfg=dict(), backbone=dict(norm_eval=False)
        )

    It reaches what no ``norm_cfg`` of a config does: BN that is a default of its class, that is
    hard-coded, or that the model makes of others while it is built (``use_syncbn`` of RTMDet).
    ``eps``, ``momentum`` and the names in the state dict stay those of the BN layer. GN and other
    norms that are no BN stay as they are.

    ``requires_grad`` of the model's own ``norm_cfg``s gives way to that of this one, since bases
    for Caffe's weights have False there, which would freeze UBN at the identity for good. What
    ``frozen_stages`` freezes stays frozen, and what ``norm_eval`` holds in evaluation mode stays
    in it: set ``norm_eval=False`` where the statistics are to train.

    Args:
        model_type (str | type): ``type`` of the model.
        norm_cfg (dict, optional): ``type`` and arguments of the new layers, see
            :func:`ubn_det.convert`: without ``type`` BN becomes UBN and SyncBN SyncUBN.
            ``requires_grad``, True by default, as in mmcv's ``build_norm_layer``.
        **model: The rest of the model's config.

    Returns:
        nn.Module: The model, of class ``model_type``.

    Raises:
        TypeError: ``norm_cfg`` is no dict or has an unknown argument.
        ValueError: The model has no BN layer, or ``norm_cfg`` makes none of them UBN.
        RuntimeError: See :func:`ubn_det.convert`.
    """
    if not isinstance(norm_cfg, (dict, type(None))):
        raise TypeError(f'norm_cfg must be a dict or None, got {norm_cfg!r}')
    norm_cfg = dict(norm_cfg or {})
    requires_grad = norm_cfg.pop('requires_grad', True)
    cfg = dict(_set_requires_grad(model, requires_grad), type=model_type)
    built = convert(MODELS.build(cfg), norm_cfg)
    if not any(isinstance(module, UBN) for module in built.modules()):
        raise ValueError(
            f'{model_type} as this config builds it has no BN that norm_cfg={norm_cfg} of WithUBN '
            'turns into UBN'
        )
    return built


def _set_requires_grad(cfg: Any, value: bool) -> Any:
    """Return a copy of a config whose every norm_cfg of BN has ``requires_grad=value``."""
    if isinstance(cfg, dict):
        cfg = type(cfg)((key, _set_requires_grad(item, value)) for key, item in cfg.items())
        if cfg.get('type') in _BN_TYPES:
            cfg['requires_grad'] = value
    elif isinstance(cfg, (list, tuple)):
        cfg = type(cfg)(_set_requires_grad(item, value) for item in cfg)
    return cfg
