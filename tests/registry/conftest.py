from versions import fill, finish, model, publish, registry, trained

__all__ = ["fill", "finish", "model", "publish", "registry", "trained"]
