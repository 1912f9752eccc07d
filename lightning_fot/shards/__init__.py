"""A memory's pairs shared out over processes of a Ray cluster: same searches, same attention, more room.

Nothing here is loaded unless ``model.memory.shards`` asks for it.
"""
