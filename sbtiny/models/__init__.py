"""Models: names, loading, chat templates, and the device they run on."""
