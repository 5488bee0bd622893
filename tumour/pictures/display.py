"""Can VTK render here? A child process is asked, since VTK ends its process where it finds no OpenGL."""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys

from tumour.pictures.results import Inapplicable

PROBE = """
import vtkmodules.vtkRenderingOpenGL2
from vtkmodules.vtkRenderingCore import vtkRenderWindow
window = vtkRenderWindow()
window.SetOffScreenRendering(True)
window.SetSize(8, 8)
window.Render()
print(window.GetClassName())
"""


def require_pyvista() -> None:
    """Errors: Inapplicable where pyvista is missing."""
    if importlib.util.find_spec("pyvista") is None:
        raise Inapplicable("pyvista is missing: run through scripts/env, or pip install 'pyvista>=0.49'")


@functools.cache
def require() -> None:
    """Choose an OpenGL window that works here without a display (EGL, else OSMesa, else the platform's own).

    VTK ends the process where it finds none, so a child process tries first.
    Errors: Inapplicable where pyvista is missing or nothing can render.
    """
    require_pyvista()
    wishes = ["vtkEGLRenderWindow", "vtkOSOpenGLRenderWindow"] if sys.platform == "linux" else []
    chosen = os.environ.get("VTK_DEFAULT_OPENGL_WINDOW")
    for window in [chosen] if chosen else [*wishes, ""]:
        setting = {"VTK_DEFAULT_OPENGL_WINDOW": window} if window else {}
        command = [sys.executable, "-c", PROBE]
        trial = subprocess.run(command, env=os.environ | setting, capture_output=True, text=True, check=False)
        if trial.returncode == 0 and window in trial.stdout:
            os.environ.update(setting)
            return
    raise Inapplicable(
        "VTK cannot render off screen here: no EGL or OSMesa library works; run through scripts/env, or "
        "on Debian apt-get install libegl1 libegl-mesa0 (only glass and growth need it)"
    )
