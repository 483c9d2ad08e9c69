"""The cache of compiled functions, without importing JAX before a command needs it."""


def use_compile_cache(cache_dir: str | None = None) -> None:
    """Keeps what JAX compiles in the cache directory; see `runtime.compile_cache`."""
    from cifar_jax.runtime import compile_cache

    compile_cache.use_compile_cache(cache_dir)
