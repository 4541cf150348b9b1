from test_tensor_parallel import *
@on_two_ranks
def test_diag(build, weights):
    exact = elbo(build(*TE, *weights), 8, 2)
    plain = elbo(build(*TE, "--bf16", *weights), 8, 2)
    r = dist.get_rank()
    def d(a,b): return f"{(a-b).abs().mean():.3f} max {(a-b).abs().max():.3f}"
    if r==0: print("\nelbo", exact.flatten()[:4], "bf16-f32", d(plain, exact))
    for name, split in SPLITS.items():
        p = elbo(build(*TE, "--bf16", *split, *weights), 8, 2)
        if r==0: print("bf16", name, "to f32", d(p, exact), "to bf16", d(p, plain))
    for recipe in RECIPES:
        flags = (*FP8, "--fp8-recipe", recipe, *weights)
        whole = elbo(build(*flags), 8, 2)
        if r==0: print(recipe, "whole to f32", d(whole, exact), "to bf16", d(whole, plain))
        for name, split in SPLITS.items():
            p = elbo(build(*flags, *split), 8, 2)
            if r==0: print(recipe, name, "to f32", d(p, exact), "to whole", d(p, whole))
