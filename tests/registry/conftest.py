from versions import fill, finish, model, publish, registry, trained, unsynced

__all__ = ["fill", "finish", "model", "publish", "registry", "trained", "unsynced"]
