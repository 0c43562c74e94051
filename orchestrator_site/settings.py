"""Every setting. Each environment variable is read here and nowhere else; the README explains each of them."""

import sys
from datetime import timedelta
from hashlib import sha256
from pathlib import Path

from django.core.exceptions import ImproperlyConfigured

from orchestrator_site.env import Environment

BASE_DIR = Path(__file__).resolve().parent.parent
env = Environment(BASE_DIR / ".env")

# --- Secrets and who may connect ---------------------------------------------------------------------------------

SECRET_KEY = env.text("SECRET_KEY", "")
if len(SECRET_KEY) < 32:
    raise ImproperlyConfigured(
        "SECRET_KEY has to be set to at least 32 characters, in the environment or in .env. `make run` makes one."
    )
INTERNAL_API_KEY = env.text("INTERNAL_API_KEY", "")
if INTERNAL_API_KEY and (len(INTERNAL_API_KEY) < 32 or not INTERNAL_API_KEY.isascii()):
    raise ImproperlyConfigured("INTERNAL_API_KEY has to be at least 32 ASCII characters.")
ALLOWED_HOSTS = env.words("ALLOWED_HOSTS", ["localhost", "127.0.0.1", "[::1]"])
WS_WITHOUT_KEY = env.choice("WS_WITHOUT_KEY", "never", {"never", "loopback", "always"})
DEBUG = env.flag("DEBUG", False)
HOST = env.text("HOST", "127.0.0.1")
PORT = env.integer("PORT", 8000, at_least=1, at_most=65535)
DJANGO_SUPERUSER_USERNAME = env.text("DJANGO_SUPERUSER_USERNAME", "admin")
DJANGO_SUPERUSER_PASSWORD = env.text("DJANGO_SUPERUSER_PASSWORD", "")
BEHIND_HTTPS = env.flag("BEHIND_HTTPS", False)
TRUSTED_PROXIES = env.networks("TRUSTED_PROXIES")

# --- The model ---------------------------------------------------------------------------------------------------

LLM_BASE_URL = env.url("LLM_BASE_URL", schemes={"http", "https"}, suffix="/v1")
LLM_API_KEY = env.text("LLM_API_KEY", "")
LLM_MODEL = env.text("LLM_MODEL", "gpt-4o-mini")
LLM_CONTEXT_TOKENS = env.integer("LLM_CONTEXT_TOKENS", 100_000, at_least=1_000)
LLM_CONNECT_TIMEOUT = env.seconds("LLM_CONNECT_TIMEOUT", 5)
LLM_FIRST_TOKEN_TIMEOUT = env.seconds("LLM_FIRST_TOKEN_TIMEOUT", 120)
LLM_TOKEN_TIMEOUT = env.seconds("LLM_TOKEN_TIMEOUT", 60)
LLM_RETRIES = env.integer("LLM_RETRIES", 3, at_most=10)
LLM_RETRY_DELAY = env.seconds("LLM_RETRY_DELAY", 0.5)
DEMO_WORD_DELAY = env.seconds("DEMO_WORD_DELAY", 0.03, at_least=0)
MULTI_AGENT_MODE = env.flag("MULTI_AGENT_MODE", True)

# --- Turns and streams -------------------------------------------------------------------------------------------

TURN_LEASE_SECONDS = env.seconds("TURN_LEASE_SECONDS", 10, at_least=1)
TURN_LEASE_RENEWAL_SECONDS = TURN_LEASE_SECONDS * 0.3
TURN_MAX_LOSSES = env.integer("TURN_MAX_LOSSES", 3, at_least=2)
TURN_MAX_SECONDS = env.seconds("TURN_MAX_SECONDS", 600)
TURN_MAX_OUTPUT_CHARS = env.integer("TURN_MAX_OUTPUT_CHARS", 200_000, at_least=1)
TURN_MAX_HANDOFFS = env.integer("TURN_MAX_HANDOFFS", 10, at_least=1)
TURN_MAX_ROUNDS = env.integer("TURN_MAX_ROUNDS", 25, at_least=1)
TURN_QUEUE_LENGTH = env.integer("TURN_QUEUE_LENGTH", 5)
TURN_RUNNER = env.choice("TURN_RUNNER", "embedded", {"embedded", "procrastinate"})
SERVER_TOOLS = env.words("SERVER_TOOLS", [])
# Of tools that are plain functions so many run at once in a process. A thread that hangs cannot be ended.
SERVER_TOOL_THREADS = 16
TURNS_AT_ONCE = env.integer("TURNS_AT_ONCE", 1_000, at_least=1)
STREAM_COMMIT_SECONDS = env.seconds("STREAM_COMMIT_SECONDS", 0.1)
STREAM_HEARTBEAT_SECONDS = env.seconds("STREAM_HEARTBEAT_SECONDS", 15)
STREAM_MAX_AGE_SECONDS = env.seconds("STREAM_MAX_AGE_SECONDS", 900)
STREAM_STALL_SECONDS = env.seconds("STREAM_STALL_SECONDS", 60)
STREAM_KEEP_HOURS = env.integer("STREAM_KEEP_HOURS", 168, at_least=1)
STREAMS_AT_ONCE = env.integer("STREAMS_AT_ONCE", 5_000, at_least=1)
OVERLOAD_SECONDS = env.seconds("OVERLOAD_SECONDS", 1.0)

# --- Bounds of a request -----------------------------------------------------------------------------------------

MAX_HEADER_BYTES = env.integer("MAX_HEADER_BYTES", 32 * 1024, at_least=1024)
MAX_BODY_BYTES = env.integer("MAX_BODY_BYTES", 2 * 1024 * 1024, at_least=1024)
MAX_BODY_SECONDS = env.seconds("MAX_BODY_SECONDS", 30)
MAX_MESSAGE_CHARS = env.integer("MAX_MESSAGE_CHARS", 200_000, at_least=1)

# --- Django ------------------------------------------------------------------------------------------------------

ROOT_URLCONF = "orchestrator_site.urls"
ASGI_APPLICATION = "orchestrator_site.asgi.application"
INSTALLED_APPS = [
    # Before staticfiles it makes `runserver` an ASGI server. Importing it costs half a second, so nobody else pays.
    *(["daphne"] if "runserver" in sys.argv else []),
    "unfold",
    "unfold.contrib.filters",
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "axes",
    "rest_framework",
    "django_eventstream",
    "django_svelte_jsoneditor",
    "drf_spectacular_sidecar",
    "orchestrator_site.schema",
    "events_app",
    "sessions_app",
    "agents_app",
    "messages_app",
]
MIDDLEWARE = [
    "orchestrator_site.middleware.RequestMiddleware",
    "servestatic.middleware.ServeStaticMiddleware",
    # Each of these costs a thread hop per request and serves people with a browser: they run under /admin/ alone.
    "orchestrator_site.admin_middleware.AdminContentPolicyMiddleware",
    "orchestrator_site.admin_middleware.AdminSecurityMiddleware",
    "orchestrator_site.admin_middleware.AdminSessionMiddleware",
    "orchestrator_site.admin_middleware.AdminCommonMiddleware",
    "orchestrator_site.admin_middleware.AdminCsrfMiddleware",
    "orchestrator_site.admin_middleware.AdminAuthenticationMiddleware",
    "orchestrator_site.admin_middleware.AdminMessageMiddleware",
    "orchestrator_site.admin_middleware.AdminFrameMiddleware",
    "axes.middleware.AxesMiddleware",
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [BASE_DIR / "templates"],
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]
database = env.database("DATABASE_URL", f"sqlite:///{BASE_DIR / 'countersign.sqlite3'}")
in_the_address = database.get("OPTIONS", {})
DATABASE_POOL_SIZE = env.integer("DATABASE_POOL_SIZE", 12, at_least=4, at_most=1_000)
# Write-ahead log so that readers and the writer do not wait for each other, IMMEDIATE because upgrading a read to a
# write fails at once whatever the timeout, FULL because what was acknowledged has to survive a power cut.
on_sqlite = {
    "OPTIONS": {
        "timeout": 8,
        "transaction_mode": "IMMEDIATE",
        "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;",
    }
}
# What each connection asks PostgreSQL for, whatever the role or the database has as its default. A lock is waited for a
# little less than a query may take, so that the log tells one from the other.
parameters = {
    "statement_timeout": "5s",
    "lock_timeout": "4s",
    "idle_in_transaction_session_timeout": "15s",
    "synchronous_commit": "on",  # what was acknowledged has to survive a power cut
    "default_transaction_isolation": r"read\ committed",
    "TimeZone": "UTC",
}
on_postgresql = {
    "CONN_MAX_AGE": 0,
    "CONN_HEALTH_CHECKS": True,
    "OPTIONS": {
        "application_name": "countersign",
        "connect_timeout": 3,
        # A statement that a connection has executed a few times is planned once and for all: with the values written
        # into it PostgreSQL used a quarter to a half more processor time.
        "server_side_binding": True,
        "prepare_threshold": 5,
        # A host that is gone without a word: what is sent is not acknowledged, or nothing comes.
        "tcp_user_timeout": 3_000,
        "keepalives_idle": 2,
        "keepalives_interval": 1,
        "keepalives_count": 3,
        **in_the_address,
        "options": " ".join(f"-c {name}={value}" for name, value in parameters.items())
        + f" {in_the_address.get('options', '')}",
        "pool": {
            "name": "countersign",
            "min_size": 2,
            # Each thread of a tool may hold one for as long as it runs, and must leave the turns theirs.
            "max_size": DATABASE_POOL_SIZE + (SERVER_TOOL_THREADS if SERVER_TOOLS else 0),
            # A request that gets no connection is answered with 503 after this.
            "timeout": 3,
            # Then the pool gives up, and who asks next has it try again: its own pauses grow to minutes.
            "reconnect_timeout": 1,
        },
    },
}
DATABASES = {"default": {**database, **(on_sqlite if "sqlite" in database["ENGINE"] else on_postgresql)}}
if TURN_RUNNER == "procrastinate":
    if "sqlite" in DATABASES["default"]["ENGINE"]:
        raise ImproperlyConfigured("TURN_RUNNER procrastinate needs PostgreSQL: set DATABASE_URL to postgres://...")
    # Its migrations do not run on SQLite.
    INSTALLED_APPS.append("procrastinate.contrib.django")
    PROCRASTINATE_WORKER_DEFAULTS = {
        "name": None,
        # A job is over as soon as its turn is claimed; those beyond it are for other workers to fetch.
        "concurrency": 50,
        "delete_jobs": "successful",
        # A job that is announced while others are fetched is found by this.
        "fetch_job_polling_interval": 0.5,
    }
REDIS_URL = env.url("REDIS_URL", schemes={"redis", "rediss", "unix"})
if REDIS_URL:
    # A server that takes connections and answers nothing must not hold anybody for longer.
    redis = {"address": REDIS_URL, "socket_connect_timeout": 1, "socket_timeout": 1}
    # Redis's channels know no databases: another installation on the same server must not hear this one's frames.
    installation = sha256(SECRET_KEY.encode()).hexdigest()[:16]
    CHANNEL_LAYERS = {
        "default": {
            "BACKEND": "channels_redis.pubsub.RedisPubSubChannelLayer",
            "CONFIG": {"hosts": [redis], "prefix": f"countersign-{installation}"},
        }
    }
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
USE_TZ = True
TIME_ZONE = "UTC"
LANGUAGE_CODE = "en"
APPEND_SLASH = True
STATIC_URL = "/static/"
STATIC_ROOT = BASE_DIR / "staticfiles"
# The files of the installed packages are served as they lie; there is no build step between install and start.
SERVESTATIC_USE_FINDERS = True
SERVESTATIC_AUTOREFRESH = False
FILE_UPLOAD_MAX_MEMORY_SIZE = MAX_BODY_BYTES
DATA_UPLOAD_MAX_MEMORY_SIZE = MAX_BODY_BYTES

# --- People who log in -------------------------------------------------------------------------------------------

AUTHENTICATION_BACKENDS = [
    "axes.backends.AxesStandaloneBackend",
    "django.contrib.auth.backends.ModelBackend",
]
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": f"django.contrib.auth.password_validation.{name}"}
    for name in ("MinimumLengthValidator", "CommonPasswordValidator", "UserAttributeSimilarityValidator")
]
AXES_FAILURE_LIMIT = 10
AXES_COOLOFF_TIME = timedelta(minutes=15)
AXES_RESET_ON_SUCCESS = True
# Locking a user name alone would let anybody lock the operators out.
AXES_LOCKOUT_PARAMETERS = [["username", "ip_address"]]
AXES_USERNAME_CALLABLE = "orchestrator_site.login.guessed_name"
AXES_VERBOSE = False
# Its pages would show the user names and browsers that strangers make up, as they are.
AXES_ENABLE_ADMIN = False
LOGIN_REDIRECT_URL = "/admin/"
SESSION_COOKIE_HTTPONLY = True
SESSION_COOKIE_SAMESITE = "Lax"
SESSION_COOKIE_SECURE = BEHIND_HTTPS
CSRF_COOKIE_SECURE = BEHIND_HTTPS
CSRF_COOKIE_SAMESITE = "Lax"
X_FRAME_OPTIONS = "DENY"
SECURE_HSTS_SECONDS = 31_536_000 if BEHIND_HTTPS else 0
SECURE_HSTS_INCLUDE_SUBDOMAINS = BEHIND_HTTPS
SECURE_HSTS_PRELOAD = BEHIND_HTTPS
SECURE_SSL_REDIRECT = BEHIND_HTTPS
SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https") if BEHIND_HTTPS else None

# Open pages are told when to read again. Without its storage and without Redis: what it says may be lost.
EVENTSTREAM_CHANNELMANAGER_CLASS = "events_app.changes.Channels"

UNFOLD = {
    "SITE_TITLE": "Countersign",
    "SITE_HEADER": "Countersign",
    "SITE_SUBHEADER": "Agents, held until signed off",
    "SITE_SYMBOL": "verified_user",
    # There is no site beside the admin that a browser could show.
    "SITE_URL": None,
    "SHOW_VIEW_ON_SITE": False,
    "SIDEBAR": {"navigation": "orchestrator_site.navigation.sidebar"},
    "DASHBOARD_CALLBACK": "orchestrator_site.dashboard.start_page",
    "STYLES": [f"{STATIC_URL}events_app/admin.css"],
}

REST_FRAMEWORK = {
    "DEFAULT_AUTHENTICATION_CLASSES": ["sessions_app.callers.CallerAuthentication"],
    "DEFAULT_PERMISSION_CLASSES": ["sessions_app.callers.IsCaller"],
    "DEFAULT_RENDERER_CLASSES": ["rest_framework.renderers.JSONRenderer"],
    "DEFAULT_PARSER_CLASSES": [],  # views read their body with `http.json_body`
    "DEFAULT_METADATA_CLASS": None,
    "DEFAULT_CONTENT_NEGOTIATION_CLASS": "orchestrator_site.http.AlwaysJSON",
    "EXCEPTION_HANDLER": "orchestrator_site.errors.to_response",
    "DEFAULT_SCHEMA_CLASS": "orchestrator_site.schema.document.Described",
    "UNAUTHENTICATED_USER": None,
    "COMPACT_JSON": True,
    "UNICODE_JSON": False,
}

VERSION = "0.1.0"
SPECTACULAR_SETTINGS = {
    "OAS_VERSION": "3.1.0",
    "TITLE": "Countersign",
    "VERSION": VERSION,
    "SERVERS": [{"url": "/"}, {"url": "/api/v1"}],
    "POSTPROCESSING_HOOKS": ["orchestrator_site.schema.document.complete"],
    "SORT_OPERATIONS": False,
}

# --- Logs: one line of JSON each, control characters escaped by the encoding ---------------------------------------

LOG_LEVEL = env.choice("LOG_LEVEL", "INFO", {"DEBUG", "INFO", "WARNING", "ERROR"})
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "filters": {"request": {"()": "orchestrator_site.logs.WithRequest"}},
    "formatters": {
        "json": {
            "()": "pythonjsonlogger.json.JsonFormatter",
            "format": "{asctime}{levelname}{name}{message}",
            "style": "{",
            "rename_fields": {"asctime": "timestamp", "levelname": "level", "name": "logger", "message": "event"},
        }
    },
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json", "filters": ["request"]}},
    "root": {"handlers": ["stderr"], "level": LOG_LEVEL},
    "loggers": {
        "django": {"level": LOG_LEVEL, "handlers": [], "propagate": True},
        # The refusals of bad requests are answers, not news; a failed request is logged by the middleware.
        "django.request": {"level": "ERROR"},
        "django.security": {"level": "ERROR"},
        "uvicorn": {"level": "WARNING"},
        # Access lines would hold query strings, and somebody will put a key there.
        "uvicorn.access": {"level": "CRITICAL"},
        "daphne": {"level": "WARNING"},
        # While Redis is away it has something to say every second; `layer_away` and `layer_back` say it once.
        "channels_redis": {"level": "CRITICAL"},
        "procrastinate": {"level": "WARNING"},
        "axes": {"level": "WARNING"},
        "psycopg": {"level": "WARNING"},
        "django_eventstream": {"level": "WARNING"},
    },
}
