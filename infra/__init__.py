"""Ground floor: settings, errors, engines and clients, local services. Imports nothing of the project."""
