"""Optimizers (AdamW, Muon and the paper's Adagrad), the learning rate schedule, and gradient clipping.

Knows the names of parameters, because it saves their states by name; knows no data and no files. Parameters may be
sharded over devices (FSDP), except with Muon.
"""

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn

from training.config import OptimConfig
from training.devices import cut_like, is_cut, whole


class Optimizer:
    """The optimizer of a run, with gradient clipping and the learning rate schedule."""

    def __init__(self, network: nn.Module, config: OptimConfig) -> None:
        self.config = config
        self._names: dict[Tensor, str] = {
            parameter: name for name, parameter in network.named_parameters() if parameter.requires_grad
        }
        self._parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self._matrices: list[tuple[nn.Parameter, nn.Parameter, int]] = []  # matrix for Muon, its parameter, head
        self._inner = self._build(network)

    def _build(self, network: nn.Module) -> list[torch.optim.Optimizer]:
        config = self.config
        if config.name == "adagrad":
            return [ClippedAdagrad(self._groups(self._parameters), lr=config.lr, grad_clip=config.grad_clip)]
        hidden = _hidden_matrices(network) if config.name == "muon" else []
        rest = [parameter for parameter in self._parameters if not any(parameter is matrix for matrix in hidden)]
        inner: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(self._groups(rest), lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
        ]
        if hidden:
            self._matrices = [part for parameter in hidden for part in _as_matrices(parameter)]
            self._names |= {matrix: f"{self._names[parameter]}[{head}]" for matrix, parameter, head in self._matrices}
            inner.append(
                torch.optim.Muon(
                    [matrix for matrix, _, _ in self._matrices],
                    lr=config.lr,
                    momentum=config.momentum,
                    weight_decay=config.weight_decay,
                    adjust_lr_fn="match_rms_adamw",  # one learning rate for both optimizers
                )
            )
        return inner

    def _groups(self, parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
        """Parameter groups with and without weight decay: vectors (norms, biases, spans) have none."""
        decayed = [p for p in parameters if p.dim() >= 2]
        rest = [p for p in parameters if p.dim() < 2]
        parts = [(part, self.config.weight_decay) for part in _unsharded_and_sharded(decayed)]
        parts += [(part, 0.0) for part in _unsharded_and_sharded(rest)]
        return [{"params": part, "weight_decay": decay} for part, decay in parts]

    def clip(self) -> float:
        """Clip the global gradient norm (the paper's Adagrad clips each parameter in its step) and return the norm."""
        bound = self.config.grad_clip if self.config.name != "adagrad" and self.config.grad_clip else math.inf
        parts = _unsharded_and_sharded([parameter for parameter in self._parameters if parameter.grad is not None])
        norms = [whole(nn.utils.get_total_norm([p.grad for p in part if p.grad is not None])) for part in parts]
        norm = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
        for part in parts:
            nn.utils.clip_grads_with_norm_(part, bound, norm)
        return float(norm)

    def step(self, *, step: int, share: float) -> float:
        """Update the parameters, clear the gradients, and return the learning rate of the update.

        Args:
            step: updates made before this one.
            share: the share of the run that is done, 0 .. 1.
        """
        rate = learning_rate(self.config, step=step, share=share)
        for matrix, parameter, head in self._matrices:
            matrix.grad = None if parameter.grad is None else _matrix_of(parameter.grad, head)
        for optimizer in self._inner:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        self.zero_grad()
        return rate

    def zero_grad(self) -> None:
        """Clear the gradients."""
        for parameter in (*self._parameters, *(matrix for matrix, _, _ in self._matrices)):
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """The optimizer state of every parameter by its name; the tensors are not sharded."""
        return {
            self._names[parameter]: {key: whole(value) for key, value in remembered.items()}
            for optimizer in self._inner
            for parameter, remembered in optimizer.state.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that `state_dict` returned."""
        for optimizer in self._inner:
            for parameter in itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups):
                optimizer.state[parameter] = {
                    key: cut_like(value, parameter) if value.dim() else value.to(parameter.device, copy=True)
                    for key, value in state.get(self._names[parameter], {}).items()
                }


def _unsharded_and_sharded(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Separate unsharded from sharded parameters, because torch does not mix them; leaves out empty lists."""
    parts: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for parameter in parameters:
        parts[is_cut(parameter)].append(parameter)
    return [part for part in parts if part]


def _hidden_matrices(network: nn.Module) -> list[nn.Parameter]:
    """The parameters for Muon: projections and persistent vectors of the layers, not embeddings and positions."""
    return [p for name, p in network.named_parameters() if name.startswith("layers.") and p.dim() >= 2]


def _as_matrices(parameter: nn.Parameter) -> list[tuple[nn.Parameter, nn.Parameter, int]]:
    """Views of a parameter as matrices, which Muon needs: persistent vectors [H, N, D] are a matrix for each head."""
    heads = parameter.shape[0] if parameter.dim() == 3 else 1
    return [(nn.Parameter(_matrix_of(parameter.detach(), head)), parameter, head) for head in range(heads)]


def _matrix_of(tensor: Tensor, head: int) -> Tensor:
    return tensor[head] if tensor.dim() == 3 else tensor


def learning_rate(config: OptimConfig, *, step: int, share: float) -> float:
    """The learning rate: linear warm-up times the schedule, which ends at `final_lr_fraction` of the peak.

    constant stays at the peak; cosine decays from the start; trapezoid decays linearly over the last `decay_fraction`
    of the run; step drops at the start of the last `decay_fraction`.

    Args:
        step: updates made before this one.
        share: the share of the run that is done, 0 .. 1.
    """
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    match config.schedule:
        case "constant":
            decay = 1.0
        case "cosine":
            decay = 0.5 * (1 + math.cos(math.pi * share))
        case "trapezoid":
            decay = min(1.0, (1 - share) / config.decay_fraction)
        case "step":
            decay = float(share < 1 - config.decay_fraction)
    return config.lr * warm * (config.final_lr_fraction + (1 - config.final_lr_fraction) * decay)


class ClippedAdagrad(torch.optim.Optimizer):
    """Adagrad with clipping of each parameter's update, the optimizer of the paper's character models.

    Clipping scales the update, not the accumulator: the accumulator sums the squares of the unclipped gradient, and a
    gradient of norm n > clip takes a step with learning rate lr * clip / n.
    """

    def __init__(self, params: Any, *, lr: float, grad_clip: float, eps: float = 1e-10) -> None:
        super().__init__(params, {"lr": lr, "grad_clip": grad_clip, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["sum"] = torch.zeros_like(parameter)
        gradient = gradient + group["weight_decay"] * parameter if group["weight_decay"] else gradient
        state["sum"].addcmul_(gradient, gradient)
        change = gradient / (state["sum"].sqrt() + group["eps"])
        if group["grad_clip"]:
            norm = whole(gradient.norm())
            change *= (group["grad_clip"] / (norm + group["eps"])).clamp(max=1)
        parameter.sub_(change, alpha=group["lr"])
