"""Every exception that a user of marft-graph can meet.

    MarftError
    ├── ConfigError           a setting is out of range or contradicts another      (ValueError)
    ├── GraphError            the object is no LangGraph app, or cannot be compiled (ValueError)
    │   └── UnknownNodeError  a node name that the graph does not have              (LookupError)
    ├── DatasetError          the data set is empty or lacks the graph's input keys (ValueError)
    ├── ModelError            a base model or adapter cannot be loaded              (OSError)
    ├── PromptTooLongError    a prompt leaves no room in the model's context        (ValueError)
    ├── StructuredOutputError  a structured answer did not parse, see below          (ValueError)
    ├── RewardError           the reward function raised or returned no number      (RuntimeError)
    ├── ReviewerError         the function that answers interrupts failed           (RuntimeError)
    ├── EpisodesFailedError   too many episodes failed to train on the rest         (RuntimeError)
    ├── TrainingCollapsedError  learning diverged and did not recover               (RuntimeError)
    ├── OutOfMemoryError      an update does not fit into memory                    (MemoryError)
    ├── EpisodeTimeoutError   an episode or a call ran past its deadline            (TimeoutError)
    ├── EngineError           an engine stopped or cannot answer                    (RuntimeError)
    │   └── CallTimeoutError  a model call was not answered within its time         (TimeoutError)
    ├── UndecidedCallError    a node asks a model and is neither trained nor frozen (LookupError)
    ├── DistributedError      another of the processes that train together failed   (RuntimeError)
    ├── CheckpointError       a checkpoint or run folder cannot be used             (RuntimeError)
    ├── ExportError           an export folder cannot be written or read            (RuntimeError)
    ├── SandboxError          model-written code cannot be run safely here           (RuntimeError)
    └── WorkflowError         a workflow folder, file or variable cannot be loaded  (ValueError)

`StructuredOutputError` is how an episode names whatever exception the app met as a structured
answer did not parse; `fault_rewards` finds it under this name. The app itself meets the exception
of its own model's class.

Each message names what was wrong, where, and what would be accepted.
"""


class MarftError(Exception):
    """Root of all exceptions raised on purpose by marft-graph."""


class ConfigError(MarftError, ValueError):
    """A setting is out of range, unknown, or contradicts another setting."""


class GraphError(MarftError, ValueError):
    """The given object is no LangGraph app, or cannot be compiled into a Flex-MG."""


class UnknownNodeError(GraphError, LookupError):
    """A node name was given that the graph does not have."""


class DatasetError(MarftError, ValueError):
    """The data set is empty, unreadable, or lacks the graph's input keys."""


class ModelError(MarftError, OSError):
    """A base model, tokenizer or adapter cannot be loaded."""


class PromptTooLongError(MarftError, ValueError):
    """A prompt leaves no room for a completion in the model's context."""


class StructuredOutputError(MarftError, ValueError):
    """An answer has not the form that the app asks for: no JSON, another schema, no tool call."""


class RewardError(MarftError, RuntimeError):
    """The reward function raised, timed out, or returned something that is no reward."""


class ReviewerError(MarftError, RuntimeError):
    """The function that answers the app's interrupts raised, or took too long."""


class EpisodesFailedError(MarftError, RuntimeError):
    """A larger share of the episodes failed than the settings allow."""


class TrainingCollapsedError(MarftError, RuntimeError):
    """Learning diverged, and going back to a good checkpoint did not help."""


class OutOfMemoryError(MarftError, MemoryError):
    """An update does not fit into memory, not even call by call."""


class EpisodeTimeoutError(MarftError, TimeoutError):
    """An episode, or one model call of it, ran past its deadline."""


class EngineError(MarftError, RuntimeError):
    """An engine was closed, died, or answered something unusable."""


class CallTimeoutError(EngineError, TimeoutError):
    """An engine did not answer a model call within the call's own time."""


class UndecidedCallError(MarftError, LookupError):
    """A node asks its own model, and nobody decided whether it is trained or frozen."""

    def __init__(self, message: str, agent: str = "") -> None:
        super().__init__(message)
        self.agent = agent
        """Agent path of the node; empty outside every node."""


class DistributedError(MarftError, RuntimeError):
    """Another of the processes that train together failed."""


class CheckpointError(MarftError, RuntimeError):
    """A checkpoint or a run folder cannot be written, read or continued."""


class ExportError(MarftError, RuntimeError):
    """An export folder cannot be written, read, or does not belong to this graph."""


class WorkflowError(MarftError, ValueError):
    """A workflow folder, a Python file or a variable in it cannot be loaded."""


class SandboxError(MarftError, RuntimeError):
    """Model-written code cannot be run here, as a limit cannot be set or does not hold."""
