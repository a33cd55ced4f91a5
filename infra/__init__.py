"""Ground floor: settings, errors, clients, local services, one statistical test. Imports nothing of the project."""
