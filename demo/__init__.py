"""The small trained demo model: its scenes and its weights.

Nothing here is imported when the node pack starts; the demo node reads only `scene`. The networks follow the
published Wan 2.1 text-to-video architecture (https://github.com/Wan-Video/Wan2.1) at a tiny size.
"""
