"""Write the list of settings that some torch lacks, from the database of names; activation reads it to refuse to set them.

python tools/make_settings.py
"""

from __future__ import annotations

import json

from torchspan.scan._coverage import OLDEST
from torchspan.scan._names import Names
from torchspan.scan._settings import SETTINGS

TENSOR = "torch.Tensor"
# config modules refuse what they do not know by themselves; torch itself is left as it is: programs set what they like on it
_LEFT_OUT = ("torch", "torch.version", "torch.torch_version")


def main() -> None:
    """Write it, a module a line."""
    names = Names.load()
    places = {place: dict(sorted(of.items())) for place, of in settings(names).items() if of}
    lines = (f"{json.dumps(place)}: {json.dumps(of)}" for place, of in sorted(places.items()))
    SETTINGS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def settings(names: Names) -> dict[str, dict[str, str]]:
    """By module, the settings that a supported release lacks although it has the module, with the releases that have them."""
    supported = ~((1 << names.minors.index(OLDEST)) - 1) & names.all
    places: dict[str, dict[str, str]] = {TENSOR: {}}
    for place in names.modules():
        module = names.look_up(place, is_module=True).mask & supported
        is_private = any(part.startswith("_") for part in place.split("."))
        if place in _LEFT_OUT or is_private or names.is_configuration(place) or not names.is_of_python(place):
            continue
        for name in names.names_in(place):
            dotted = f"{place}.{name}"
            mask = names.look_up(dotted).mask
            is_meant = not name.startswith("_") and not name.isupper()  # a module's own state and constants are not
            if is_meant and module & ~mask and mask & supported and names.is_setting(dotted):
                places.setdefault(place, {})[name] = _text(names, mask)
    for name in names.members_of_tensors_alone:
        if names.is_setting(f"{TENSOR}.{name}"):
            places[TENSOR][name] = _text(names, names.look_up_member(f"{TENSOR}.{name}").mask)
    return places


def _text(names: Names, mask: int) -> str:
    return " ".join(minor for index, minor in enumerate(names.minors) if mask >> index & 1)


if __name__ == "__main__":
    main()
