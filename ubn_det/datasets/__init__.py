"""Tier 3: the data set that the project draws itself."""

from .generated import CLASSES, SIDE_RANGE, Scene, SceneObject, draw_scene, generate_coco

__all__ = ['CLASSES', 'SIDE_RANGE', 'Scene', 'SceneObject', 'draw_scene', 'generate_coco']
