"""Where the time of a training step goes, by the parts of a model."""
import time

import torch

ATTEND = 'attention'
EXPERTS = 'experts and dispatch'
ROUTER = 'router'
DENSE = 'dense and shared MLP'
REST = 'embedding, norms and rest'
HEAD = 'head and loss'
OPTIMIZER = 'optimizer'
DATA = 'data'
ORDER = (ATTEND, EXPERTS, ROUTER, DENSE, REST, HEAD, OPTIMIZER, DATA)


class Parts:
    """A mark begins a part, which lasts until the next mark. Forward, modules set one when they
    begin and when they end; backward, their outputs set one when the gradient arrives there, as
    autograd goes back in the opposite order. What follows the final norm, and that of an MTP layer,
    is head and loss. On a GPU a mark is an event: nothing waits for it.

    kinds: {class of a module: its part}"""

    def __init__(self, model, device, kinds):
        self.model = model
        self.device = device
        self.kinds = kinds
        self.marks = []

    def watch(self):
        """-> handles of hooks on the modules that begin a part"""
        part = {'': REST}
        hooks = []
        for name, module in self.model.named_modules():
            outer = part[name.rpartition('.')[0]]
            own = self.kinds.get(type(module), outer)
            if outer == ATTEND:                             # with its norms
                own = ATTEND
            part[name] = own
            after = outer
            if name == 'model.norm' or name.endswith('shared_head.norm'):
                after = HEAD
            if type(module) in self.kinds:
                hooks += self.hooks(module, own, after)
        return hooks

    def hooks(self, module, own, after):
        def begin(module, inputs):
            self.mark(own)

        def end(module, inputs, outputs):
            self.leave(outputs, own, after)

        return module.register_forward_pre_hook(begin), module.register_forward_hook(end)

    def mark(self, part):
        now = time.perf_counter()
        if self.device.type == 'cuda':
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self.marks.append((part, now))

    def leave(self, outputs, part, after):
        if isinstance(outputs, torch.Tensor):
            outputs = (outputs,)
        for tensor in outputs:
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda grad: self.mark(part))
        self.mark(after)

    def times(self, step):
        """-> {part: seconds} of a step, which waits until it is done"""
        self.marks = []
        hooks = self.watch()
        step()
        for hook in hooks:
            hook.remove()
        found = {}
        for (part, began), (_, ended) in zip(self.marks, self.marks[1:]):
            if self.device.type == 'cuda':
                spent = began.elapsed_time(ended) / 1e3
            else:
                spent = ended - began
            found[part] = found.get(part, 0.0) + spent
        return found
