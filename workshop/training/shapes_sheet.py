"""The demo model's scenes on the contact sheet and in the quality measurements."""

from __future__ import annotations

from ...demo.scene import Background, Scene, SceneObject

SHEET_SCENES = (
    Scene(
        SceneObject("star", "yellow", "large", "plain", "right"),
        SceneObject("ring", "magenta", "medium", "plain", "up"),
        Background("clouds", "navy", "left"),
    ),
    Scene(
        SceneObject("square", "red", "medium", "stripes", "down"),
        SceneObject("circle", "cyan", "small", "plain", "left"),
        Background("waves", "grey", "right"),
    ),
    Scene(
        SceneObject("triangle", "green", "large", "dots", "left"),
        SceneObject("cross", "white", "medium", "plain", "down-right"),
        Background("clouds", "brown", "up"),
    ),
    Scene(
        SceneObject("circle", "blue", "large", "stripes", "up-right"),
        SceneObject("star", "orange", "small", "plain", "still"),
        Background("waves", "forest", "down"),
    ),
    Scene(
        SceneObject("ring", "white", "large", "plain", "up-left"),
        SceneObject("triangle", "red", "small", "plain", "right"),
        Background("clouds", "forest", "still"),
    ),
    Scene(
        SceneObject("cross", "orange", "medium", "dots", "still"),
        SceneObject("square", "cyan", "large", "stripes", "down-left"),
        Background("clouds", "grey", "down-right"),
    ),
)
