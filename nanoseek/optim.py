"""What moves the weights: the learning rate of a step, the parameter groups, AdamW and Muon."""
import math

import torch


def learning_rate_at(step, s):
    """The rate of step 0, 1, ...: linear warm-up; cosine, or (wsd) constant and linear decay"""
    if step < s.warmup_steps:
        return s.learning_rate * (step + 1) / s.warmup_steps
    if s.schedule == 'cosine':
        done = min((step - s.warmup_steps) / max(s.max_steps - s.warmup_steps, 1), 1.0)
        height = 0.5 * (1 + math.cos(math.pi * done))
    else:
        height = min((s.max_steps - step) / max(s.decay_frac * s.max_steps, 1), 1.0)
    return s.learning_rate * (s.min_lr_frac + (1 - s.min_lr_frac) * max(height, 0.0))


def rows_of_matrices(c):
    """Return {kind of parameter: heights of its blocks of rows, which repeat}. Each block is a
    matrix to Muon: a head, the latent and the rotated key, an expert's gate and up."""
    head = (c.head_dim,)
    if c.attention == 'mla':
        head = (c.qk_nope_head_dim + c.qk_rope_head_dim,)
    return {
        'q_proj': head,
        'q_b_proj': head,
        'k_proj': head,
        'v_proj': head,
        'kv_b_proj': (c.qk_nope_head_dim, c.v_head_dim),
        'kv_a_proj_with_mqa': (c.kv_lora_rank, c.qk_rope_head_dim),
        'gate_up_proj': (c.moe_intermediate_size,),
    }


def parameter_groups(model, s):
    """Return the groups for torch's optimizers. Matrices decay, norms do not. rows: the blocks of
    rows_of_matrices, or the whole height; [] for embedding, head, norms and routers, which AdamW
    moves. scale: of the learning rate"""
    blocks = rows_of_matrices(model.config)
    groups = {}
    for name, p in model.named_parameters():
        kind = name.removesuffix('.weight').split('.')[-1]
        rows = ()
        if s.optimizer == 'muon' and kind.endswith(('_proj', '_mqa')) and p.numel() > 0:
            rows = blocks.get(kind, (p.shape[-2],))
        scale = s.embedding_lr if kind in ('embed_tokens', 'lm_head') else 1.0
        groups.setdefault((rows, p.dim() > 1, scale), []).append(p)
    return [{'params': params, 'weight_decay': s.weight_decay * decays, 'rows': list(rows),
             'scale': scale} for (rows, decays, scale), params in groups.items()]


def set_learning_rate(optimizer, step, s):
    """Set every group's learning rate for a step. Return the rate without the groups' scales."""
    lr = learning_rate_at(step, s)
    for group in optimizer.param_groups:
        group['lr'] = lr * group['scale']
    return lr


# Coefficients of x, x^3 and x^5 in the steps of Newton-Schulz. Each polynomial is the nearest to 1
# on the interval that the previous one leaves, 5% wider for bfloat16's rounding (arXiv 2505.16932).
POLYNOMIALS = (
    (7.9957, -21.4339, 14.4122),
    (3.8853, -2.6279, 0.4502),
    (3.4811, -2.3788, 0.4278),
    (2.6319, -1.8179, 0.3802),
)


def orthogonal(x, dtype):
    """x (..., A, B) -> approximately U V^T of its SVD, float32. Newton-Schulz in dtype brings
    singular values from 0.003 to 1 times x's norm to between 0.7 and 1.3."""
    y = x.flatten(0, -3).to(dtype)  # (matrices, A, B)
    tall = x.shape[-2] > x.shape[-1]
    y = y.mT if tall else y
    y = y / (y.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for first, third, fifth in POLYNOMIALS:
        gram = y @ y.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=third, alpha=fifth)
        y = torch.baddbmm(y, polynomial, y, beta=first)
    y = y.mT if tall else y
    return y.float().view_as(x)


def whole(x):
    """Return x with its shards, which FSDP makes, put together; all ranks must call it."""
    return x.full_tensor() if hasattr(x, 'full_tensor') else x


def shard_like(x, p):
    """Return this rank's shard of x if p is a shard of a tensor of its shape."""
    if not hasattr(p, 'full_tensor') or x.shape != p.shape:
        return x
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(x.to(p.device), p.device_mesh, p.placements, src_data_rank=None)


class Muon(torch.optim.AdamW):
    """AdamW, except that groups with rows take Nesterov's momentum made orthogonal, in steps as
    large as AdamW's. Jordan et al., kellerjordan.github.io/posts/muon; the factor
    0.2 sqrt(max(A, B)) is from arXiv 2502.16982."""

    def __init__(self, groups, *args, dtype, momentum=0.95, **kwargs):
        super().__init__(groups, *args, **kwargs)
        self.dtype = dtype
        self.momentum = momentum
        self._step_supports_amp_scaling = False     # a GradScaler leaves out bad steps itself

    @torch.no_grad()
    def step(self):
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group['rows']]
        super().step()
        self.param_groups = groups
        for group in groups:
            if group['rows']:
                for params in stacks(group['params']):
                    self.move(params, group['rows'], group['lr'], group['weight_decay'])

    def move(self, params, rows, lr, decay):
        """A step of params, of one shape (A, B) or (E, A, B)"""
        steps = torch.stack([whole(self.direction(p)) for p in params])
        periods = steps.unflatten(-2, (-1, sum(rows)))  # (..., A / sum(rows), sum(rows), B)
        for matrices in periods.split(rows, -2):
            larger = max(matrices.shape[-2:])
            matrices.copy_(orthogonal(matrices, self.dtype) * 0.2 * larger ** 0.5)
        for p, step in zip(params, steps):
            p.mul_(1 - lr * decay)
            p.add_(shard_like(step, p), alpha=-lr)

    def direction(self, p):
        """Nesterov's momentum of p's gradient"""
        state = self.state[p]
        if not state:
            state['step'] = torch.zeros(())     # AdamW looks for it when a state is loaded
            state['momentum_buffer'] = torch.zeros_like(p)
        momentum = state['momentum_buffer']
        momentum.mul_(self.momentum).add_(p.grad)
        step = p.grad.add(momentum, alpha=self.momentum)
        if p.dim() == 3:                        # experts: one that no token met stays where it is
            step = step * (p.grad.norm(dim=(1, 2), keepdim=True) > 0)       # (E, 1, 1)
        return step


def stacks(params):
    """Lists of parameters of one shape each: many at a time are faster, all at once too large"""
    shapes = {}
    for p in params:
        if p.grad is not None:
            shapes.setdefault(p.shape, []).append(p)
    for shape, same in shapes.items():
        most = max(2 ** 26 // shape.numel(), 1)
        for i in range(0, len(same), most):
            yield same[i:i + most]


def make_optimizer(s, model, dtype):
    """Return AdamW or Muon for the settings. dtype: of the model's matmuls"""
    groups = parameter_groups(model, s)
    options = {'lr': s.learning_rate, 'betas': (s.beta1, s.beta2), 'eps': s.eps,
               'fused': model.head.device.type in ('cpu', 'cuda')}
    if s.optimizer == 'adamw':
        return torch.optim.AdamW(groups, **options)
    if dtype != torch.bfloat16:
        dtype = torch.float32       # float16 does not hold the polynomial's range
    return Muon(groups, dtype=dtype, **options)
