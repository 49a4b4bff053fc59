"""Virtual clients on workers that Ray starts; the only room that imports ray."""
