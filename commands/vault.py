"""What the backup agent must be told, since it reads no environment and chooses no programs."""

from __future__ import annotations

from msgspec.structs import replace

from commands.settings import Loaded
from schema.settings import Settings


def postgres_bins(loaded: Loaded) -> dict[str, str]:
    """PostgreSQL's programs by major version: those that are installed, and over them those that the settings name."""
    from deploy.pginstall import installs

    found = {str(major): str(folder) for major, folder in installs().items()}
    return found | loaded.settings.backup.postgres_bins


def config_file(loaded: Loaded) -> str | None:
    """The settings file that belongs to a backup."""
    if loaded.settings.backup.config is not None:
        return loaded.settings.backup.config
    return None if loaded.file is None else str(loaded.file.absolute())


def backup_settings(loaded: Loaded) -> Settings:
    """The settings with both of them."""
    settings = loaded.settings
    backup = replace(settings.backup, config=config_file(loaded), postgres_bins=postgres_bins(loaded))
    return replace(settings, home=str(loaded.home), backup=backup)


def backup_environment(loaded: Loaded) -> dict[str, str]:
    """Both of them, for the agent's process."""
    bins = ",".join(f"{major}={folder}" for major, folder in postgres_bins(loaded).items())
    found = {"MT5_BACKUP_POSTGRES_BINS": bins, "MT5_BACKUP_CONFIG": config_file(loaded)}
    return {name: value for name, value in found.items() if value}
