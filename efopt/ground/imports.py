"""Something to be done about a module that is no dependency, once it is imported."""

import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def when_imported(name: str, action: Callable[[Any], None]) -> None:
    """Calls ``action(module)``: now if the module is there, else after its import."""
    module = sys.modules.get(name)
    if module is not None:
        action(module)
        return
    sys.meta_path.insert(0, _Finder(name, action))


class _Finder:
    """Finds one module as all others do, once, and has its loader call back."""

    def __init__(self, name: str, action: Callable[[Any], None]):
        self.name, self.action = name, action

    def find_spec(
        self, name: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        del path, target
        if name != self.name or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                self.action(module)

            spec.loader.exec_module = exec_module
        return spec
