"""The names of a whole torch release, from those of its files: stars followed, stubs merged, operators and C modules added."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property

from _module_names import ClassNames, ModuleNames, read_module

# made by C code while torch is imported, where no file shows them; `tests/scan/test_database.py` compares with real torches
_TENSORS = ("Byte", "Char", "Double", "Float", "Half", "Int", "Long", "Short", "Bool", "BFloat16")
MADE_BY_C: dict[str, tuple[str, ...]] = {
    "torch.cuda": tuple(f"{kind}Tensor" for kind in _TENSORS),
    "torch.xpu": tuple(f"{kind}Tensor" for kind in _TENSORS),
    "torch.sparse": tuple(f"{kind}Tensor" for kind in _TENSORS),
    "torch.cuda.sparse": tuple(f"{kind}Tensor" for kind in _TENSORS),
}
# of torch's C module, but in no stub; each is in the releases whose C++ code mentions it
NOT_IN_STUBS = """
    AVG ArgumentSpec Capsule Code CompleteArgumentSpec DeepCopyMemoTable ExcludeDispatchKeyGuard ExecutionPlan FatalError
    Gradient OperatorInfo PyObjectType SUM ScriptClass ScriptClassFunction ScriptDictIterator ScriptDictKeyIterator
    ScriptListIterator ScriptObjectProperty StaticModule _freeze_functional_tensor _from_blob _mirror_autograd_meta_to _mkldnn
    _functionalize_enable_reapply_views _functionalize_get_storage_size _functionalize_has_data_mutation
    _functionalize_is_multi_output_view _functionalize_was_shallow_copy_data bit cpp get_autocast_ipu_dtype
    get_autocast_xla_dtype int1 int2 int3 int4 int5 int6 int7 is_autocast_ipu_enabled is_autocast_xla_enabled read_vitals
    set_autocast_ipu_dtype set_autocast_ipu_enabled set_autocast_xla_dtype set_autocast_xla_enabled set_vital uint1 uint2 uint3
    uint4 uint5 uint6 uint7 vitals_enabled
"""
# the same for members of its classes
MEMBERS_NOT_IN_STUBS = {"TensorBase": ("const_data_ptr",), "Stream": ("native_handle",)}
# of these classes the stub is made from the same list as the C++ code: what it lacks is not there
COMPLETE = frozenset({"torch._C.Tag"})
_DEVICE_CODE = re.compile(r"cuda|cudnn|cusparse|nccl|nvtx|cufile|gds|xpu|xccl|hip", re.IGNORECASE)
# of these the files tell everything, although the syntax alone does not say so
CLOSED = {
    "torch": "its loops over dir(torch._C) give the names in the stubs",
    "torch._jit_internal": "a loop over range(…)",
}


@dataclass
class Wheel:
    """What is read of one release: the text of its ``.py`` and ``.pyi`` files by path, and the texts in its libraries."""

    release: str
    sources: Mapping[str, str]
    operators: str  # native_functions.yaml
    libraries: bytes

    def mentions(self, name: str) -> bool:
        """Whether the C++ code has `name` as a text, on its own or as an operator's."""
        return name in self._texts

    @cached_property
    def _texts(self) -> frozenset[str]:
        texts = self.libraries.replace(b"(", b"\0").decode().split("\0")
        return frozenset(texts) | {name.partition(".")[0] for name in texts}


@dataclass
class Release:
    """Every module of a release, by dotted name."""

    wheel: Wheel
    modules: dict[str, ModuleNames] = field(default_factory=dict)
    from_c: set[str] = field(default_factory=set)  # those whose stub is all there is

    @property
    def name(self) -> str:
        return self.wheel.release


def read_release(wheel: Wheel, read: Callable[..., ModuleNames] = read_module) -> Release:
    """Read every file of `wheel`, and merge each module's stub into it."""
    release = Release(wheel)
    stubs: dict[str, ModuleNames] = {}
    for path, text in wheel.sources.items():
        parts = path.rpartition(".")[0].split("/")
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        if not all(part.isidentifier() for part in name.split(".")):
            continue
        is_stub = path.endswith(".pyi")
        (stubs if is_stub else release.modules)[name] = read(name, text, is_package=is_package, is_stub=is_stub)
    for name, stub in stubs.items():
        if name in release.modules:
            _merge_stub(release.modules[name], stub)
        else:
            release.modules[name] = stub
            release.from_c.add(name)
    for name in [*release.modules]:
        while name := name.rpartition(".")[0]:
            release.modules.setdefault(name, ModuleNames(is_open=True))
    return release


def _merge_stub(module: ModuleNames, stub: ModuleNames) -> None:
    for name, entry in stub.names.items():
        before = module.names.get(name)
        if before is None or (entry.startswith("(") and not before.startswith(("(", ":", "="))):
            module.names[name] = entry
            if name in stub.classes:
                module.classes[name] = stub.classes[name]
        elif name in module.classes and name in stub.classes:
            for member, its in stub.classes[name].members.items():
                module.classes[name].members.setdefault(member, its)


def settle_c_names(releases: list[Release]) -> None:
    """Add names that may be there: a release's stub lacks them, another's has them, and the former's C++ code mentions them.

    Stubs of C modules are written by hand and lag behind. A name that no C++ code here mentions in a release that has it (CUDA
    only, such as NCCL's) cannot be judged: it is added too.
    """
    for module in sorted(set().union(*(release.from_c for release in releases))):
        for release in releases:  # a stub may be younger than its module
            if module not in release.modules and _may_have(release, releases, module.rpartition(".")[2]):
                release.modules[module] = ModuleNames()
                release.from_c.add(module)
        having = [release for release in releases if module in release.modules]
        for name in sorted(set().union(*(release.modules[module].names for release in having))):
            _settle(having, [release.modules[module].names for release in having], module, name)
        for owner in sorted(set().union(*(release.modules[module].classes for release in having))):
            known = next(
                class_names for release in having if (class_names := release.modules[module].classes.get(owner)) is not None
            )
            for release in having:
                if owner in release.modules[module].names:
                    release.modules[module].classes.setdefault(owner, deepcopy(known))
            those = [release for release in having if owner in release.modules[module].classes]
            members = [release.modules[module].classes[owner].members for release in those]
            for name in sorted(set().union(*members)):
                _settle(those, members, f"{module}.{owner}", name)


def _settle(releases: list[Release], tables: list[dict[str, str]], owner: str, name: str) -> None:
    with_name = [release for release, table in zip(releases, tables) if name in table]
    if name.startswith("__") or len(with_name) == len(releases) or owner in COMPLETE:
        return
    # the wheels that are read have no CUDA code, so nothing there mentions its names
    is_visible = not _DEVICE_CODE.search(f"{owner}.{name}") and all(release.wheel.mentions(name) for release in with_name)
    for release, table in zip(releases, tables):
        if name not in table and (not is_visible or release.wheel.mentions(name)):
            known = next(table[name] for table in tables if name in table)
            table[name] = "(?" if known.startswith("(") else known


def _may_have(release: Release, releases: list[Release], name: str) -> bool:
    return release.wheel.mentions(name) or not any(other.wheel.mentions(name) for other in releases)


def link(release: Release) -> None:
    """Resolve what goes from module to module: replaced modules, stars, what is an instance of what, operators."""
    for name, names in MADE_BY_C.items():
        if name in release.modules:
            release.modules[name].names.update(dict.fromkeys(names, ""))
        elif name.rpartition(".")[0] in release.modules:
            release.modules[name] = ModuleNames(names=dict.fromkeys(names, ""), is_open=True)
    for name in NOT_IN_STUBS.split():
        if release.wheel.mentions(name):
            release.modules["torch"].names.setdefault(name, "")
    for owner, names in MEMBERS_NOT_IN_STUBS.items():
        class_names = release.modules.get("torch._C", ModuleNames()).classes.get(owner)
        if class_names is not None:
            class_names.members.update((name, "(?") for name in names if release.wheel.mentions(name))
    for name, module in release.modules.items():
        if name in CLOSED:
            module.is_open = False
        if module.replaced_by:
            _add_class_names(release, module)
    visited: set[str] = set()
    for name in release.modules:
        _follow_stars(release, name, visited)
    for module in [*release.modules.values()]:
        for key, target in module.redirected.items():
            _redirect(release, key, target)
    for module in release.modules.values():
        for table in (module.names, *(class_names.members for class_names in module.classes.values())):
            for name, entry in table.items():
                table[name] = _with_known_class(release, entry)
    _add_operators(release)


def _with_known_class(release: Release, entry: str) -> str:
    """An entry whose class is followed through functions and aliases, and left out where it is none."""
    if entry.startswith("@"):
        class_name = _result(release, entry[1:])
        return f"@{class_name}" if class_name else ""
    parameters, _, result = entry.partition(">")
    return f"{parameters}>{result}" if result and _is_class(release, result) else parameters


def _result(release: Release, callee: str) -> str:
    """The class of what a call of `callee` gives."""
    module, name = find(release, callee)
    if module is None:
        return ""
    if name in module.classes:
        return callee
    entry = module.names[name]
    result = entry.partition(">")[2] if entry.startswith("(") else ""
    return result if result and _is_class(release, result) else ""


def _redirect(release: Release, key: str, target: str) -> None:
    """Make the module `key`, and those below it, the same as `target` and those below that."""
    for name in [name for name in release.modules if name == target or name.startswith(f"{target}.")]:
        names = {inner: f"={name}.{inner}" for inner in release.modules[name].names}
        release.modules[key + name[len(target) :]] = ModuleNames(names=names, is_open=release.modules[name].is_open)


def find(release: Release, dotted: str, depth: int = 20) -> tuple[ModuleNames | None, str]:
    """The module and the name in it that `dotted` ends at after its aliases; (None, "") where that is not known."""
    place, _, last = dotted.rpartition(".")
    module = release.modules.get(place)
    if module is None or last not in module.names or depth == 0:
        return None, ""
    entry = module.names[last]
    return find(release, entry[1:], depth - 1) if entry.startswith("=") and entry[1:] != dotted else (module, last)


def _is_class(release: Release, dotted: str) -> bool:
    module, name = find(release, dotted)
    return module is not None and name in module.classes


def _add_class_names(release: Release, module: ModuleNames) -> None:
    """A module that is replaced by an instance of a class has the class's names too."""
    todo, seen = [module.replaced_by], set()
    while todo:
        dotted = todo.pop()
        if dotted in seen or dotted.startswith(("!", "*")):  # "!": a class from elsewhere, ModuleType
            continue
        seen.add(dotted)
        if dotted.endswith(".PropModule"):  # asks the module that it replaces
            module.names.setdefault("m", "")
            continue
        place, name = find(release, dotted)
        if place is None or name not in place.classes:
            module.is_open = True
            continue
        for member, entry in place.classes[name].members.items():
            module.names.setdefault(member, entry if entry.startswith(("@", "#")) else "")
        todo += [base for base in place.classes[name].bases.split(",") if base]


def _follow_stars(release: Release, name: str, visited: set[str]) -> None:
    if name in visited:
        return
    visited.add(name)
    module = release.modules[name]
    for source in dict.fromkeys([*module.stars, *module.exported_from]):
        other = release.modules.get(source)
        if other is None:
            module.is_open = module.is_open or (source in module.stars and name not in CLOSED)
            continue
        _follow_stars(release, source, visited)
        names = other.exported if other.exported is not None else [n for n in other.names if not n.startswith("_")]
        if source in module.exported_from:
            module.exported = [*(module.exported or []), *names]
        if source in module.stars:
            for exported in names:
                module.names.setdefault(exported, f"={source}.{exported}")
            if (other.is_open or source.startswith("torch._C")) and other.exported is None and name not in CLOSED:
                module.is_open = True


def _add_operators(release: Release) -> None:
    """``torch.ops.aten.…`` from native_functions.yaml, and what Python files register."""
    names = {f"aten::{name}" for name in re.findall(r"^- func: (\w+)", release.wheel.operators, re.MULTILINE)}
    for module in release.modules.values():
        names |= module.operators
    release.modules["torch.ops"] = ModuleNames(is_open=True)
    for qualified in sorted(names):
        space, _, name = qualified.partition("::")
        if space.isidentifier() and name.partition(".")[0].isidentifier():
            place = release.modules.setdefault(f"torch.ops.{space}", ModuleNames())
            place.names[name.partition(".")[0]] = ""


def settle_operators(releases: list[Release]) -> None:
    """An operator that Python registers in one release may have been C++'s in another: it is added where C++ mentions it."""
    spaces = set().union(*({name for name in release.modules if name.startswith("torch.ops.")} for release in releases))
    for space in sorted(spaces):
        for release in releases:
            release.modules.setdefault(space, ModuleNames())
        for name in sorted(set().union(*(release.modules[space].names for release in releases))):
            for release in releases:
                if release.wheel.mentions(name):
                    release.modules[space].names.setdefault(name, "")


def settle_kinds(releases: list[Release]) -> None:
    """Keep the kinds of a parameter where a later release takes one more of them than an earlier one; else drop them."""
    for module in sorted(set().union(*(release.modules for release in releases))):
        having = [release.modules[module] for release in releases if module in release.modules]
        _settle_kinds([content.names for content in having])
        for owner in sorted(set().union(*(content.classes for content in having))):
            _settle_kinds([content.classes[owner].members for content in having if owner in content.classes])


def _settle_kinds(tables: list[dict[str, str]]) -> None:
    for name in set().union(*tables):
        entries = [table[name] for table in tables if ":" in table.get(name, "") and table[name].startswith("(")]
        kinds = _grown_parameters(entries) if entries else frozenset()
        for table in tables:
            entry = table.get(name, "")
            if entry.startswith("(") and ":" in entry:
                table[name] = _keep_kinds(entry, kinds)


def _grown_parameters(entries: list[str]) -> frozenset[str]:
    """The parameters that take, in a later one of these releases, a kind more than None that they did not take before."""
    before: dict[str, set[str]] = {}
    grown: set[str] = set()
    for entry in entries:
        for part in entry[1:].partition(">")[0].split(","):
            parameter, _, kinds = part.partition(":")
            accepted = set(filter(None, kinds.split("|")))
            if not accepted:
                continue
            if parameter in before and accepted - before[parameter] - {"None"} and before[parameter] < accepted:
                grown.add(parameter)
            before[parameter] = accepted
    return frozenset(grown)


def _keep_kinds(entry: str, kinds: frozenset[str]) -> str:
    parameters, arrow, result = entry.partition(">")
    parts = [part if part.partition(":")[0] in kinds else part.partition(":")[0] for part in parameters[1:].split(",")]
    return "(" + ",".join(parts) + arrow + result


# as one text


def encode(releases: list[Release]) -> str:
    """The database: a line of releases, then each module's line and its names' lines, with masks of the releases they hold for.

    A mask has one bit for each release, the oldest one lowest, in hexadecimal; left out, it is the one of the line above it in
    the hierarchy. A module's line is ``NUL name, mask, mask of the releases in which it may have more names, '?' where unknown
    names tell nothing``; a name's is ``name, mask, entry``; a class's members follow it, with a dot before their name.
    """
    lines = [" ".join(release.name for release in releases)]
    for name in sorted(set().union(*(release.modules for release in releases))):
        tables = [release.modules.get(name) for release in releases]
        mask = _mask(table is not None for table in tables)
        open_mask = _mask(table is not None and table.is_open for table in tables)
        is_partial = name.startswith("torch.ops.") or any(name in release.from_c for release in releases)
        lines.append(f"\0{name}\t{mask:x}\t{open_mask:x}\t{'?' if is_partial else ''}")
        lines += _encode_names([table.names if table else {} for table in tables], mask, "", tables)
    return "\n".join(lines) + "\n"


def _encode_names(tables: list[dict[str, str]], mask: int, prefix: str, modules: Iterable[ModuleNames | None]) -> Iterable[str]:
    for name in sorted(set().union(*tables)):
        entries = [table.get(name) for table in tables]
        for entry in dict.fromkeys(entry for entry in entries if entry is not None):
            its = _mask(other == entry for other in entries)
            yield f"{prefix}{name}\t{'' if its == mask else f'{its:x}'}\t{entry}".rstrip("\t")
        classes: list[ClassNames | None] = [
            module.classes.get(name) if module is not None and (entry or "").startswith(":") else None
            for module, entry in zip(modules, entries)
        ]
        if not prefix and any(classes):
            members = [class_names.members if class_names else {} for class_names in classes]
            yield from _encode_names(members, _mask(class_names is not None for class_names in classes), ".", [])


def _mask(bits: Iterable[bool]) -> int:
    return sum(1 << index for index, bit in enumerate(bits) if bit)
