"""The guarded write, as it runs in the server: a Lua script, and the same text as a function.

Keys and values of ``codec``; two more arguments: the ttl in milliseconds or nothing, and ``1`` to restate. It answers how many
rows were applied, equal, stale, expired and fenced, or the place of the first key that holds something else.
"""

from __future__ import annotations

import hashlib
import re
from datetime import timedelta

import redis

from spark_fs.errors import InvalidError, SparkFSError
from spark_fs.online import codec

# Times and builds are compared as five unsigned 32-bit words: doubles are exact there, and text compare would follow the
# locale. Equal strings are one object in Lua, so that a row sent again costs next to nothing. MGET answers nil for a key
# of another type; EXISTS over the absent ones, one cheap call, finds those before they are overwritten; a value shorter
# than a header (28 bytes) is not ours either, and one of just a header is a tombstone. All checks come before the first
# write: a call is refused as a whole or done as a whole. What was restated keeps out older writers for GRAVE, also where its
# own ttl ends sooner; a row that replaces it inherits what is left of that. Readers judge the ttl themselves.
SCRIPT = b"""
local rows, ttl_ms, restating = #KEYS, tonumber(ARGV[#KEYS + 1]), ARGV[#KEYS + 2] == '1'
local stored, absent = redis.call('MGET', unpack(KEYS)), {}
for i = 1, rows do
  if not stored[i] then absent[#absent + 1] = KEYS[i] elseif #stored[i] < 28 then return i end
end
if #absent > 0 and redis.call('EXISTS', unpack(absent)) > 0 then
  for i = 1, rows do
    local kind = redis.call('TYPE', KEYS[i]).ok
    if kind ~= 'none' and kind ~= 'string' then return i end
  end
end
local words = struct.unpack
local applied, equal, stale, expired, fenced = 0, 0, 0, 0, 0
local winner, writes, last = {}, {}, 0
for i = 1, rows do
  local key, new = KEYS[i], ARGV[i]
  local old = winner[key] or stored[i]
  local order, raised, same = 1, 0, false
  if old == new then
    order = 0
  elseif old then
    local a0, a1, a2, a3, a4, a5 = words('>I4I4I4I4I4I4', new)
    local b0, b1, b2, b3, b4, b5 = words('>I4I4I4I4I4I4', old)
    raised = a0 - b0
    order = a1 ~= b1 and a1 - b1 or a2 ~= b2 and a2 - b2 or a3 ~= b3 and a3 - b3 or a4 ~= b4 and a4 - b4 or a5 - b5
    if raised > 0 and restating then
      same = string.sub(new, 5) == string.sub(old, 5)
      order = 1
    end
  end
  if order > 0 and raised < 0 then
    fenced = fenced + 1
  elseif order > 0 then
    winner[key] = new
    if same then equal = equal + 1 else applied = applied + 1 end
    writes[last + 1], writes[last + 2] = key, new
    last = last + 2
  elseif order == 0 then
    equal = equal + 1
  else
    stale = stale + 1
  end
end
if not ttl_ms and not restating then
  if last > 0 then redis.call('MSET', unpack(writes)) end
  return {applied, equal, stale, expired, fenced}
end
local clock, grave_ms, fences, was = redis.call('TIME'), %GRAVE_MS%, {}, {}
local now_ms = clock[1] * 1000 + clock[2] / 1000
local function expires_ms(value)
  local high, low = words('>I4I4', value, 5)
  return math.ceil(((high - 2147483648) * 4294967296 + low) / 1000) + ttl_ms + 1
end
local function bury(key, value, ms)
  redis.call('SET', key, string.sub(value, 1, 4) .. string.rep('\\0', 24), 'PX', string.format('%.0f', ms))
end
for i = 1, rows do
  local old = stored[i]
  if ttl_ms and old and winner[KEYS[i]] and not was[KEYS[i]] then
    local left_ms = redis.call('PTTL', KEYS[i])
    was[KEYS[i]] = old
    if left_ms > 0 and (#old == 28 or now_ms + left_ms > expires_ms(old) + 1) then fences[KEYS[i]] = left_ms end
  end
end
for i = 1, last, 2 do
  local key, new = writes[i], writes[i + 1]
  local fence_ms = restating and grave_ms or fences[key] or 0
  if #new == 28 then
    bury(key, new, grave_ms)
  elseif not ttl_ms then
    redis.call('SET', key, new)
  elseif expires_ms(new) > now_ms then
    local until_ms = math.max(expires_ms(new), now_ms + fence_ms)
    redis.call('SET', key, new, 'PXAT', string.format('%.0f', until_ms))
  else
    applied, expired = applied - 1, expired + 1
    if restating then
      bury(key, new, grave_ms)
    elseif fences[key] then
      bury(key, was[key], fences[key])
    else
      redis.call('DEL', key)
    end
  end
end
return {applied, equal, stale, expired, fenced}
""".replace(b"%GRAVE_MS%", b"%d" % (codec.GRAVE // timedelta(milliseconds=1)))
DIGEST = hashlib.sha1(SCRIPT, usedforsecurity=False).hexdigest().encode()
#: The same text as a function, for logins that may not run scripts (``library``). Another text has another name, so
#: that two versions of spark_fs can use one server.
FUNCTION = b"spark_fs_write_%b" % DIGEST[:8]


def library() -> str:
    """The text of the Redis library with the guarded write as its only function, the script's own text inside."""
    name = FUNCTION.decode()
    library_name, body = name.replace("_write", ""), SCRIPT.decode()
    return f"#!lua name={library_name}\nredis.register_function('{name}', function(KEYS, ARGV)\n{body}end)\n"


def forbids_scripts(error: redis.RedisError) -> bool:
    """Whether the login may run neither EVALSHA nor EVAL. All servers name the command in quotes."""
    return isinstance(error, redis.exceptions.NoPermissionError) and re.search("'eval(sha)?'", str(error)) is not None


def lacks_function(error: redis.RedisError) -> bool:
    """Whether FCALL was refused: not allowed, not known to a server before 7.0, or no such function."""
    return isinstance(error, redis.ResponseError) and re.search("(?i)['`]fcall['`]|^Function not found", str(error)) is not None


def no_function(error: redis.RedisError) -> SparkFSError:
    """What is said where neither the script nor the function can be called."""
    return InvalidError.of(
        "SFS-630",
        f"The login of the online store may not run scripts, and cannot call the function {FUNCTION.decode()} either.",
        why=f"The server said: {error}.",
        fix="let an administrator run what spark-fs online acl prints (--redis 6.2 where the server is older than 7.0)",
    )
