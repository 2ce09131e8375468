"""A tracked `nn.Module`: parameters and buffers under clean names, filled in place on restore."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from ktrain.errors import ConfigError, InternalError
from ktrain.format import objects
from ktrain.format.shard import Role
from ktrain.state.known_module import KnownModule, can_look, loads_in_place
from ktrain.state.parts import Collector, Context, OwnedParameter
from ktrain.state.saved import LiveRow, Reader, Saved, Wishes
from ktrain.state.stages import join_module
from ktrain.state.tensors import PLAIN_TYPES, Leaf, dtype_name, is_dtensor, local_of

_EXTRA_STATE = "_extra_state"  # torch's name for what get_extra_state() returns
_COMPILED = "_orig_mod."
_CHECKPOINTED = "_checkpoint_wrapped_module."  # its module leaves it out of state dicts, not of parameters' names


class Stored(Enum):
    """What of a module is stored: all of it, or all but the parameters that require no gradient."""

    ALL = "all"
    TRAINABLE = "trainable"


class ModulePart:
    """A module, whatever wraps it: names have neither DDP's `module.` nor torch.compile's `_orig_mod.`.

    A tensor that the module holds under two names (tied weights) is stored once; the other names are aliases.
    Where frozen parameters are left out, the part's JSON names them, so that nobody takes them for lost.
    """

    kind = "module"
    is_per_rank = False

    def __init__(self, name: str, module: torch.nn.Module, stored: Stored = Stored.ALL) -> None:
        if any(type(child).__name__ == "FullyShardedDataParallel" for child in module.modules()):
            raise ConfigError(
                f"part {name!r}: FullyShardedDataParallel (FSDP1) is not supported; "
                "use torch.distributed.fsdp.fully_shard"
            )
        self.name = name
        self._module = module
        self._stored = stored

    def describe(self, context: Context) -> tuple[list[Leaf], dict[str, Any]]:
        # First the state dict: fully_shard puts its sharded parameters back in a hook of it.
        state = self._module.state_dict(keep_vars=can_look(self._module))
        names = self._clean_names(state)
        replicated = self._replicated(context)
        first = self._learn_parameters(context, names, replicated)
        left_out = self._left_out()
        collector = Collector(context)
        aliases: dict[str, str] = {}
        extra: dict[str, Any] = {}
        for raw, value in state.items():
            leaf = f"{self.name}/{names[raw]}"
            if _is_extra(raw) or not isinstance(value, torch.Tensor):
                extra[names[raw]] = collector.encode(value, leaf)
            elif raw in left_out:
                continue
            elif raw in first:
                aliases[names[raw]] = names[first[raw]]
            else:
                collector.add(leaf, value, Role.REPLICATED if raw in replicated else Role.RANK)
        about = {"kind": self.kind, "keys": list(names.values()), "aliases": aliases, "extra": extra}
        if self._stored is Stored.TRAINABLE:
            about["frozen"] = [names[raw] for raw in state if raw in left_out]
        return collector.leaves, about

    def know(self, leaves: Sequence[Leaf], about: dict[str, Any], context: Context) -> KnownModule | None:
        # What is left out hangs on requires_grad, which a look at tensors does not see.
        if not can_look(self._module) or about["extra"] or self._stored is Stored.TRAINABLE:
            return None
        known = KnownModule(self._module, leaves, about, context.parameters.maps[-1])
        return known if known.is_possible else None

    def plan(self, context: Context, wishes: Wishes) -> None:
        saved = wishes.saved
        state = self._module.state_dict()
        names = self._clean_names(state)
        self._learn_parameters(context, names, self._replicated(context))
        about = wishes.objects[self.name] = join_module(self.name, names.values(), wishes)
        frozen = set(about.get("frozen", ()))
        self._pass_over(frozen, names, wishes)
        aliases = about.get("aliases", {})
        rows: list[LiveRow] = []
        for raw, value in state.items():
            name = names[raw]
            if _is_extra(raw) or not isinstance(value, torch.Tensor):
                if name not in about.get("extra", {}):
                    wishes.problems.append(f"{self.name}/{name}: expected extra state, found none stored")
            elif name not in frozen:
                leaf = f"{self.name}/{name}"
                rows.append(
                    (leaf, _source_name(leaf, self.name, aliases[name], saved) if name in aliases else leaf, value)
                )
        for leaf, source, value in wishes.add_live(rows):
            self._wish(source, leaf, value, wishes)
        for value in about.get("extra", {}).values():
            wishes.add_all(value)

    def load(self, saved_objects: Mapping[str, Any], reader: Reader, context: Context) -> None:
        del context
        # The live tensors themselves, not views of them: then load_state_dict below copies none onto itself.
        state = self._module.state_dict(keep_vars=True)
        extra, frozen = saved_objects["extra"], set(saved_objects.get("frozen", ()))
        filled: dict[str, Any] = {}
        for raw, name in self._clean_names(state).items():
            value = state[raw]
            if name in extra:
                device = value.device if isinstance(value, torch.Tensor) else torch.device("cpu")
                value = objects.decode(extra[name], tensor=partial(reader.create, device=device))
            elif name not in frozen:
                reader.fill(f"{self.name}/{name}", value if type(value) in PLAIN_TYPES else local_of(value))
            filled[raw] = value
        # The live tensors have their values already; this is for the module's load hooks and its extra state.
        if extra or not loads_in_place(self._module):
            self._module.load_state_dict(filled)

    def derive(self, seed: int) -> None:
        raise InternalError(f"part {self.name!r} is a module and belongs to no rank alone")

    def _pass_over(self, frozen: set[str], names: Mapping[str, str], wishes: Wishes) -> None:
        """Says which of the module's tensors the checkpoint left out; refuses those that this part would store."""
        left_out = self._left_out()
        kept = [raw for raw, name in names.items() if name in frozen]
        wishes.problems.extend(
            f"{self.name}/{names[raw]}: frozen when it was saved, and so left out of the checkpoint; load it yourself "
            "and give ktrain.trainable(module) with it frozen"
            for raw in kept
            if raw not in left_out
        )
        if kept:
            wishes.notices.append(
                f"part {self.name!r}: {len(kept)} frozen parameters are not in the checkpoint; "
                "they stay as the program made them"
            )

    def _wish(self, source: str, name: str, value: torch.Tensor, wishes: Wishes) -> None:
        found = wishes.saved.shape_and_dtype(source)
        expected = tuple(value.shape), dtype_name(value.dtype)
        if found is None:
            wishes.problems.append(f"{name}: expected {expected[1]} {list(expected[0])}, found none stored")
        elif found != expected:
            wishes.problems.append(
                f"{name}: expected {expected[1]} {list(expected[0])}, found {found[1]} {list(found[0])}"
            )
        else:
            wishes.add(source, wishes.spreads.box_of(value), as_name=name, into=local_of(value))

    def _clean_names(self, state: Mapping[str, Any]) -> dict[str, str]:
        """Raw key to clean name.

        Raises:
            ConfigError: two keys have one clean name.
        """
        prefixes = [f"{path}." if path else "" for path, child in self._module.named_modules() if _is_ddp(child)]
        if not prefixes and not any(_COMPILED in raw for raw in state):
            return dict(zip(state, state, strict=True))
        names: dict[str, str] = {}
        for raw in state:
            name = raw
            for prefix in reversed(prefixes):  # innermost first: outer prefixes stay as they are
                if name.startswith(f"{prefix}module."):
                    name = prefix + name[len(prefix) + len("module.") :]
            names[raw] = name.replace(_COMPILED, "")
        if len(set(names.values())) != len(names):
            clean = list(names.values())
            twice = sorted({name for name in clean if clean.count(name) > 1})
            raise ConfigError(
                f"part {self.name!r}: two tensors are named {twice[0]!r} without their wrappers; rename one"
            )
        return names

    def _replicated(self, context: Context) -> set[str]:
        """Raw keys of the parameters that DDP keeps equal on all ranks."""
        replicated: set[str] = set()
        for path, child in self._module.named_modules():
            if not _is_ddp(child) or not _is_whole_world(child, context.topology.world_size):
                continue
            prefix = f"{path}.module." if path else "module."
            for key, parameter in child.module.named_parameters(remove_duplicate=False):
                if key not in child.parameters_to_ignore and not is_dtensor(parameter):
                    replicated.add(_state_key(prefix + key))
        return replicated

    def _left_out(self) -> set[str]:
        """Raw keys of the parameters that are not stored; asked anew for each plan, as `requires_grad` may change."""
        if self._stored is Stored.ALL:
            return set()
        parameters = self._module.named_parameters(remove_duplicate=False)
        return {_state_key(path) for path, parameter in parameters if not parameter.requires_grad}

    def _learn_parameters(self, context: Context, names: Mapping[str, str], replicated: set[str]) -> dict[str, str]:
        """Tells the context this module's parameters; returns raw keys that repeat another key's tensor."""
        seen: dict[int, str] = {}
        repeats: dict[str, str] = {}
        owned: dict[int, OwnedParameter] = {}
        # By object, never by address: every rank must find the same aliases, also one whose part is empty.
        tensors = [
            *self._module.named_parameters(remove_duplicate=False),
            *self._module.named_buffers(remove_duplicate=False),
        ]
        for path, tensor in tensors:
            raw = _state_key(path)
            if raw not in names:
                continue
            first = seen.setdefault(id(tensor), raw)
            if first != raw:
                repeats[raw] = first
            elif isinstance(tensor, torch.nn.Parameter):
                clean = names[raw]
                owned[id(tensor)] = OwnedParameter(f"{self.name}.{clean}", f"{self.name}/{clean}", raw in replicated)
        context.learn(owned)
        return repeats


def _source_name(leaf: str, part: str, alias: str, saved: Saved) -> str:
    """The name under which a tied tensor's value was stored: its own, or that of the tensor it was tied to."""
    return leaf if saved.shape_and_dtype(leaf) is not None else f"{part}/{alias}"


def _state_key(path: str) -> str:
    """The key in the state dict of a parameter of that path."""
    return path.replace(_CHECKPOINTED, "")


def _is_extra(key: str) -> bool:
    return key.rpartition(".")[2] == _EXTRA_STATE


def _is_ddp(module: torch.nn.Module) -> bool:
    return isinstance(module, DistributedDataParallel)


def _is_whole_world(module: Any, world_size: int) -> bool:
    """DDP over a part of the ranks does not say what the other ranks hold under the same names."""
    size: int = module.process_group.size()
    return size == world_size
