package sni

import "fmt"

// A Description is the AlertDescription of RFC 8446, Section 6.
type Description uint8

// The descriptions that clients are sent, spelled as in the RFC except for the case.
const (
	UnexpectedMessage Description = 10
	RecordOverflow    Description = 22
	IllegalParameter  Description = 47
	DecodeError       Description = 50
	DecryptError      Description = 51
	InternalError     Description = 80
	UserCanceled      Description = 90
	MissingExtension  Description = 109
	UnrecognizedName  Description = 112
)

// String returns the name that RFC 8446 gives the description, such as "unrecognized_name".
func (d Description) String() string {
	switch d {
	case UnexpectedMessage:
		return "unexpected_message"
	case RecordOverflow:
		return "record_overflow"
	case IllegalParameter:
		return "illegal_parameter"
	case DecodeError:
		return "decode_error"
	case DecryptError:
		return "decrypt_error"
	case InternalError:
		return "internal_error"
	case UserCanceled:
		return "user_canceled"
	case MissingExtension:
		return "missing_extension"
	case UnrecognizedName:
		return "unrecognized_name"
	}
	return fmt.Sprintf("description %d", uint8(d))
}

// Record returns the TLS record of a fatal alert with the description.
func (d Description) Record() [7]byte {
	const (
		alert = 21 // ContentType
		fatal = 2  // AlertLevel
	)
	return [7]byte{alert, 3, 3, 0, 2, fatal, byte(d)}
}

// An Alert says why a client is refused: the description is for the client, the reason for people.
// It holds no bytes that came from the client.
type Alert struct {
	Description Description
	Reason      string
}

// Error returns the reason and the alert, such as "no server name (alert 112, unrecognized_name)".
func (a Alert) Error() string {
	return fmt.Sprintf("%s (alert %d, %v)", a.Reason, uint8(a.Description), a.Description)
}

// An answer is the result of a Parser. It stands for an error in a value without pointers.
type answer uint8

const (
	pending answer = iota
	found
	nameless
	address6 // in place of a name
	notTLS
	notHandshake
	proxyHeader
	plainHTTP
	ssh
	postgreSQL
	ssl2
	rdp
	interleaved
	emptyRecord
	longRecord
	notClientHello
	overrun
	trailing
	longSessionID
	badCipherSuites
	noCompression
	emptyList
	secondServerName
	tooLate
	emptyName
	longName
	emptyLabel
	leadingHyphen
	brackets
	withPort
	url
	asterisk
	notASCII
	control
	otherCharacter
)

// The errors are variables, so that refusing allocates nothing.
var alerts = [...]error{
	notTLS:           Alert{UnexpectedMessage, "neither TLS nor anything else that is known here"},
	notHandshake:     Alert{UnexpectedMessage, "first record is not a handshake"},
	proxyHeader:      Alert{UnexpectedMessage, "a PROXY protocol header in place of TLS: one is read only where .accept-proxy is in the hosts directory, and only one"},
	plainHTTP:        Alert{UnexpectedMessage, "plain HTTP, not TLS"},
	ssh:              Alert{UnexpectedMessage, "SSH, not TLS"},
	postgreSQL:       Alert{UnexpectedMessage, "PostgreSQL without direct TLS (sslnegotiation=direct, since PostgreSQL 17)"},
	ssl2:             Alert{UnexpectedMessage, "client hello in the format of SSL 2.0, which is too old"},
	rdp:              Alert{UnexpectedMessage, "RDP, which does not begin with TLS"},
	interleaved:      Alert{UnexpectedMessage, "another record type within the client hello"},
	emptyRecord:      Alert{DecodeError, "empty handshake record"},
	longRecord:       Alert{RecordOverflow, "record is longer than 2^14 bytes"},
	notClientHello:   Alert{UnexpectedMessage, "first message is not a client hello"},
	overrun:          Alert{DecodeError, "a length in the client hello does not fit"},
	trailing:         Alert{DecodeError, "a list in the client hello does not end where it should"},
	longSessionID:    Alert{DecodeError, "session id is longer than 32 bytes"},
	badCipherSuites:  Alert{DecodeError, "length of the cipher suites is zero or odd"},
	noCompression:    Alert{DecodeError, "client hello has no compression methods"},
	emptyList:        Alert{DecodeError, "server name list is empty"},
	secondServerName: Alert{DecodeError, "client hello has a second server name extension"},
	tooLate:          Alert{InternalError, "no server name within the first 64 KiB"},
	emptyName:        Alert{UnrecognizedName, "server name is empty"},
	longName:         Alert{UnrecognizedName, "server name is longer than 254 bytes"},
	emptyLabel:       Alert{UnrecognizedName, "server name has an empty label"},
	leadingHyphen:    Alert{UnrecognizedName, "a label of the server name begins with a hyphen"},
	address6:         Alert{UnrecognizedName, "server name is an IPv6 address, which names no host"},
	brackets:         Alert{UnrecognizedName, "server name has brackets, and is not just an IPv6 address"},
	withPort:         Alert{UnrecognizedName, "server name has a port behind it"},
	url:              Alert{UnrecognizedName, "server name is a URL, or has a path behind it"},
	asterisk:         Alert{UnrecognizedName, "server name has an asterisk, which no name of a host has"},
	notASCII:         Alert{UnrecognizedName, "server name has a character that is not ASCII: it must be in A-labels (xn--)"},
	control:          Alert{UnrecognizedName, "server name has a space or a control character"},
	otherCharacter:   Alert{UnrecognizedName, "server name has a character other than letters, digits, '-', '_' and '.'"},
}
