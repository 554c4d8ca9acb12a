"""What moves the weights: the learning rate of a step, the parameter groups, AdamW and Muon."""
import math

import torch


def learning_rate_at(step, s):
    """The learning rate of step 0, 1, ...: a linear warm-up, then a cosine, or (wsd) a constant
    with a linear end"""
    if step < s.warmup_steps:
        return s.learning_rate * (step + 1) / s.warmup_steps
    if s.schedule == 'cosine':
        steps = max(s.max_steps - s.warmup_steps, 1)
        done = min((step - s.warmup_steps) / steps, 1.0)
        height = 0.5 * (1 + math.cos(math.pi * done))
    else:
        steps = max(s.decay_frac * s.max_steps, 1)
        height = min((s.max_steps - step) / steps, 1.0)
    height = max(height, 0.0)
    return s.learning_rate * (s.min_lr_frac + (1 - s.min_lr_frac) * height)


def rows_of_matrices(c):
    """Config -> {kind of parameter: heights of the blocks of rows that are matrices of their own},
    again and again: a head's, the latent's and the rotated key's, the gate's and the up's"""
    if c.attention == 'mla':
        head = (c.qk_nope_head_dim + c.qk_rope_head_dim,)
    else:
        head = (c.head_dim,)
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
    """-> what torch's optimizers take as groups. Matrices decay, norms do not. rows: for Muon those
    of rows_of_matrices, else the whole height; [] where AdamW is used: embedding, head, norms and
    routers. scale: of the learning rate"""
    blocks = rows_of_matrices(model.config)
    groups = {}
    for name, p in model.named_parameters():
        kind = name.removesuffix('.weight').split('.')[-1]
        is_matrix = kind.endswith(('_proj', '_mqa')) and p.numel() > 0
        rows = ()
        if s.optimizer == 'muon' and is_matrix:
            rows = blocks.get(kind, (p.shape[-2],))
        decay = 0.0
        if p.dim() > 1:
            decay = s.weight_decay
        scale = 1.0
        if kind in ('embed_tokens', 'lm_head'):
            scale = s.embedding_lr
        groups.setdefault((rows, decay, scale), []).append(p)
    return [{'params': params, 'weight_decay': decay, 'rows': list(rows), 'scale': scale}
            for (rows, decay, scale), params in groups.items()]


def set_learning_rate(optimizer, lr):
    """Every group's own, for a step with the learning rate lr"""
    for group in optimizer.param_groups:
        group['lr'] = lr * group.get('scale', 1.0)      # older checkpoints have none


# Coefficients of x, x^3 and x^5 in the steps of Newton-Schulz. Each is the polynomial nearest to 1
# on the interval that the one before leaves, 5% wider for bfloat16's rounding (arXiv 2505.16932):
# four of them come as near as five times Jordan's (3.4445, -4.7750, 2.0315)
POLYNOMIALS = (
    (7.9957, -21.4339, 14.4122),
    (3.8853, -2.6279, 0.4502),
    (3.4811, -2.3788, 0.4278),
    (2.6319, -1.8179, 0.3802),
)


def orthogonal(x, dtype):
    """x (..., A, B) -> its U V^T, about, in float32. Newton-Schulz, computed in dtype, brings
    singular values of 0.003 to 1 times x's norm to between 0.7 and 1.3"""
    tall = x.shape[-2] > x.shape[-1]
    y = x.flatten(0, -3).to(dtype)  # (matrices, A, B)
    if tall:
        y = y.mT
    y = y / (y.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for first, third, fifth in POLYNOMIALS:
        gram = y @ y.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=third, alpha=fifth)
        y = torch.baddbmm(y, polynomial, y, beta=first)
    if tall:
        y = y.mT
    return y.float().view_as(x)


def unchanged(x, like=None):
    return x


class Muon(torch.optim.AdamW):
    """AdamW, but in groups with rows Nesterov's momentum made orthogonal, in steps as large as
    AdamW's. Jordan et al., kellerjordan.github.io/posts/muon; the factor 0.2 sqrt(max(A, B)) is
    that of arXiv 2502.16982.

    whole and part: where a rank has only a part of each parameter, whole(x) puts the parts
    together, and part(x, like) is the one that belongs to the parameter like."""

    def __init__(self, groups, *args, dtype, whole=unchanged, part=unchanged, momentum=0.95,
                 **kwargs):
        super().__init__(groups, *args, **kwargs)
        self.dtype = dtype
        self.whole = whole
        self.part = part
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
        steps = torch.stack([self.whole(self.direction(p)) for p in params])
        periods = steps.unflatten(-2, (-1, sum(rows)))  # (..., A / sum(rows), sum(rows), B)
        for matrices in periods.split(rows, -2):
            larger = max(matrices.shape[-2:])
            matrices.copy_(orthogonal(matrices, self.dtype) * 0.2 * larger ** 0.5)
        for p, step in zip(params, steps):
            p.mul_(1 - lr * decay)
            p.add_(self.part(step, p), alpha=-lr)

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
            used = p.grad.norm(dim=(1, 2), keepdim=True) > 0  # (E, 1, 1)
            step = step * used
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


def make_optimizer(s, model, dtype, whole=unchanged, part=unchanged):
    """settings, model, dtype of its matmuls -> AdamW or Muon; whole and part are Muon's"""
    groups = parameter_groups(model, s)
    options = {
        'lr': s.learning_rate,
        'betas': (s.beta1, s.beta2),
        'eps': s.eps,
        'fused': model.head.device.type in ('cpu', 'cuda'),
    }
    if s.optimizer == 'adamw':
        return torch.optim.AdamW(groups, **options)
    if dtype != torch.bfloat16:
        dtype = torch.float32       # float16 does not hold the polynomial's range
    return Muon(groups, dtype=dtype, whole=whole, part=part, **options)
