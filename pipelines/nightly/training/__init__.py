"""What a nightly run trains for an adapter, and which of its versions challenges the champion."""
